"""Compile every shipped variant of the portable kernel for a GPU that need not be here, and report what it uses.

``python -m foveal.kernels.block_sparse.compiling`` prints one JSON line per variant: shared memory, registers, spills.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveal.kernels.block_sparse.portable import block_sparse_forward
from foveal.kernels.block_sparse.tiles import SHARED_EVERYWHERE, padded, tile_for

CAPABILITIES = (80, 86, 89, 90, 120)
SWITCHES = (
    "EVEN", "UNIFORM",
    "TILED", "HAS_PARTIAL", "HAS_BITS", "HAS_BLOCK_BIAS", "HAS_KEY_BIAS", "HAS_PROXIES", "HAS_VAR", "HAS_DENSE",
    "HAS_Q_ORDER", "HAS_INIT", "NEED_LSE", "POSITIVE",
)  # fmt: skip
FEATURES: dict[str, set[str]] = {
    "plain": {"EVEN", "UNIFORM", "TILED", "HAS_DENSE", "HAS_Q_ORDER", "POSITIVE"},
    "ragged": {"UNIFORM", "TILED", "HAS_DENSE", "NEED_LSE", "POSITIVE"},
    "masked": {"HAS_PARTIAL", "HAS_Q_ORDER", "POSITIVE"},
    "everything": set(SWITCHES) - {"EVEN", "UNIFORM", "TILED"},
}
SHORT = {"bf16": "*bf16", "fp32": "*fp32"}


@dataclass(frozen=True)
class Usage:
    """What one compiled variant takes. shared in bytes, registers per thread, spill in bytes."""

    capability: int
    dtype: str
    head_dim: int
    feature: str
    shared: int
    registers: int
    spill: int


def _signature(dtype: str) -> dict[str, str]:
    half, short, word, real = SHORT[dtype], "*i16", "*i32", "*fp32"
    kinds = dict.fromkeys(("Q", "K", "V", "Out", "InitOut", "ProxyK", "ProxyV"), half)
    kinds |= dict.fromkeys(("Low", "High", "Coord"), short)
    kinds |= dict.fromkeys(("Lse", "InitLse", "BlockBias", "KeyBias", "ProxyN", "ProxyVar"), real)
    kinds |= dict.fromkeys(
        (
            "QStart",
            "QLen",
            "KvStart",
            "KvLen",
            "Count",
            "NFull",
            "Index",
            "Dense",
            "Every",
            "Launch",
            "QOrder",
            "RowBits",
            "Listed",
        ),
        word,
    )
    return {n: kinds.get(n, "fp32" if n == "scale" else "i32") for n in block_sparse_forward.arg_names}


def compile_variant(capability: int, dtype: str, head_dim: int, feature: str) -> Usage:
    tile = tile_for(capability, SHARED_EVERYWHERE, 2 if dtype == "bf16" else 4, head_dim)
    on = FEATURES[feature]
    constants: dict[str, Any] = {name: name in on for name in SWITCHES}
    constants |= {
        "D": head_dim,
        "DP": padded(head_dim),
        "BM": tile.BM,
        "BN": tile.BN,
        "STAGES": tile.stages,
        "AXES": 4 if "HAS_PARTIAL" in on else 0,
    }
    constants |= {"KSUB": 4 if "TILED" in on else 0}
    constants |= {n: 1 for n in ("q_d", "k_d", "v_d", "o_d", "io_d")}
    signature = {n: ("constexpr" if n in constants else kind) for n, kind in _signature(dtype).items()}
    names = block_sparse_forward.arg_names
    hints = [i for i, n in enumerate(names) if signature[n].startswith("*") or n.endswith(("_n", "_h", "_b", "_c"))]
    attrs = {(i,): [["tt.divisibility", 16]] for i in hints if n_is_wide(names[i], signature[names[i]])}
    source = ASTSource(block_sparse_forward, signature, {(names.index(n),): c for n, c in constants.items()}, attrs)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spill = assembled(kernel.asm["ptx"], capability)
    return Usage(capability, dtype, head_dim, feature, kernel.metadata.shared, registers, spill)


def n_is_wide(name: str, kind: str) -> bool:
    """Pointers and the strides of q, k, v, out and the proxies are multiples of 16 in practice."""
    return kind.startswith("*") or name.split("_")[0] in {"q", "k", "v", "o", "io", "p", "pv", "var"}


def assembled(ptx: str, capability: int, overlapping: bool = False) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas reports them. overlapping: a kernel that lives by products running beside other work."""
    arch = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        tool = _ptxas(capability)
        done = subprocess.run(
            [tool, "-v", f"-arch={arch}", str(source), "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas refused the variant for {arch}: {done.stderr.strip()[:300]}")
    if overlapping and "serialized" in done.stderr:
        raise RuntimeError(f"ptxas runs matrix products one after the other: {done.stderr.strip()[:300]}")
    registers = max((int(x) for x in re.findall(r"Used (\d+) registers", done.stderr)), default=0)
    spill = sum(int(x) for x in re.findall(r"(\d+) bytes spill", done.stderr))
    return registers, spill


def _ptxas(capability: int) -> str:
    knobs = triton.knobs.nvidia
    tool = getattr(knobs, "ptxas_blackwell", knobs.ptxas) if capability >= 100 else knobs.ptxas
    return tool.path


VARIANTS = (
    ("bf16", 128, "plain"),
    ("bf16", 128, "everything"),
    ("bf16", 64, "masked"),
    ("bf16", 256, "ragged"),
    ("fp32", 128, "plain"),
)


def main(capabilities: tuple[int, ...] = CAPABILITIES) -> list[Usage]:
    found = []
    for capability in capabilities:
        for variant in VARIANTS:
            found.append(compile_variant(capability, *variant))
            print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    return found


if __name__ == "__main__":
    main()
