"""Compile every shipped kind of gated kernel for GPUs that need not be here, and report what each takes.

``python -m foveal.kernels.gated_linear.compiling`` prints one JSON line per kernel: shared memory, registers, spills.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveal.kernels.block_sparse.compiling import CAPABILITIES, assembled
from foveal.kernels.gated_linear.plain_call import JOINED, query_shape, shape_of, sum_shape
from foveal.kernels.gated_linear.plain_gradients import key_gradients, query_gradients
from foveal.kernels.gated_linear.plain_kernels import attend, join_parts, token_sums
from foveal.kernels.gated_linear.portable import chunk_outputs, chunk_states
from foveal.kernels.gated_linear.portable_backward import chunk_gradients
from foveal.kernels.gated_linear.portable_call import STATE_STAGES, STATE_WARPS, precisions, state_tile
from foveal.kernels.gated_linear.tiles import Tile, tile_for

GATED = {"states": chunk_states, "outputs": chunk_outputs, "gradients": chunk_gradients}
PLAIN = {"tokens": token_sums, "join": join_parts, "attend": attend, "queries": query_gradients, "keys": key_gradients}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT = (
    "x_d",
    "y_d",
    "q_d",
    "k_d",
    "v_d",
    "do_d",
    "o_d",
    "a_d",
    "gf_d",
    "gb_d",
    "dq_d",
    "dk_d",
    "dv_d",
    "dgf_d",
    "dgb_d",
)
ELEMENT = (
    "Q",
    "K",
    "V",
    "X",
    "Y",
    "DO",
    "Out",
    "Added",
    "DQ",
    "DK_",
    "DV_",
)  # pointers to the inputs' dtype; all others are fp32
INTEGERS = ("H", "N", "M", "P", "PER", "heads")


@dataclass(frozen=True)
class Variant:
    """kernel: a key of GATED or PLAIN. keys, values: widths. gate: vector or scalar. directions: forward or both."""

    kernel: str
    dtype: str
    keys: int
    values: int
    gate: str = "vector"
    directions: str = "both"


VARIANTS = (
    Variant("states", "bf16", 64, 64, "vector", "forward"),
    Variant("states", "bf16", 32, 64, "vector", "both"),
    Variant("states", "fp32", 128, 128, "vector", "both"),
    Variant("outputs", "bf16", 64, 64, "vector", "forward"),
    Variant("outputs", "bf16", 32, 64, "vector", "both"),
    Variant("outputs", "bf16", 64, 64, "scalar", "both"),
    Variant("outputs", "fp16", 128, 128, "vector", "both"),
    Variant("outputs", "fp32", 128, 128, "vector", "both"),
    Variant("gradients", "bf16", 32, 64, "vector", "both"),
    Variant("gradients", "bf16", 64, 64, "vector", "forward"),
    Variant("gradients", "bf16", 64, 64, "scalar", "forward"),
    Variant("gradients", "fp16", 128, 128, "vector", "both"),
    Variant("gradients", "fp32", 128, 128, "vector", "both"),
    *(Variant(name, "bf16", 96, 96) for name in PLAIN),
    *(Variant(name, "fp32", 128, 128) for name in PLAIN),
)
QUICK = (
    Variant("outputs", "bf16", 32, 64, "vector", "both"),
    Variant("gradients", "fp16", 128, 128, "vector", "both"),
    Variant("tokens", "fp32", 128, 128),
    Variant("keys", "fp16", 128, 128),
)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes. shared in bytes, registers per thread, spill in bytes."""

    capability: int
    variant: Variant
    shared: int
    registers: int
    spill: int


def compile_variant(capability: int, variant: Variant, tile: Tile | None = None) -> Usage:
    kernel = (GATED | PLAIN)[variant.kernel]
    constants, options = _gated(variant, tile) if variant.kernel in GATED else _plain(variant)
    names = kernel.arg_names
    constants = {n: c for n, c in (dict.fromkeys(UNIT, 1) | constants).items() if n in names}
    signature = {n: "constexpr" if n in constants else _kind(n, variant) for n in names}
    wide = [i for i, n in enumerate(names) if signature[n].startswith("*") or n.endswith(("_n", "_h", "_b"))]
    attrs = {(i,): [["tt.divisibility", 16]] for i in wide if signature[names[i]] != "constexpr"}
    source = ASTSource(kernel, signature, {(names.index(n),): c for n, c in constants.items()}, attrs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spill = assembled(made.asm["ptx"], capability)
    return Usage(capability, variant, made.metadata.shared, registers, spill)


Settings = tuple[dict[str, Any], dict[str, int]]


def _gated(variant: Variant, tile: Tile | None) -> Settings:
    """-> constants, options"""
    backward, states = variant.kernel == "gradients", variant.kernel == "states"
    dtype, vector, keys, values = DTYPES[variant.dtype], variant.gate == "vector", variant.keys, variant.values
    tile = tile or tile_for(dtype, keys, values, vector, backward, 1 + (variant.directions == "both"))
    product, mixed = precisions(dtype)
    bk, bv = state_tile(keys, values, 1000) if states else (tile.BK, tile.BV)
    constants = {
        "DK": keys, "DV": values, "BK": bk, "BV": bv, "KTILES": -(-keys // bk), "VTILES": -(-values // bv), "C": tile.C,
        "VECTOR": vector, "FORWARD": True, "BACKWARD": variant.directions == "both", "HAS_STATES": True, "QUERY": False,
        "PRODUCT": product, "MIXED": mixed, "HAS_FIRST": True, "NEED_LAST": True, "STAGES": STATE_STAGES,
    }  # fmt: skip
    if states:
        return constants, {"num_warps": STATE_WARPS, "num_stages": STATE_STAGES}
    return constants, {"num_warps": tile.warps, "num_stages": 1}


def _plain(variant: Variant) -> Settings:
    dtype = DTYPES[variant.dtype]
    of: Any = {"attend": query_shape, "tokens": functools.partial(sum_shape, means=True)}.get(variant.kernel, shape_of)
    shape = of(variant.keys, variant.values, dtype)
    constants = JOINED if variant.kernel == "join" else shape.switches(variant.keys, variant.values, dtype)
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    switches = dict.fromkeys(("HAS_KG", "HAS_VG", "WEIGHTED", "MEANS", "DIVIDE", "HAS_ADDED"), True) | {
        "ALIGN": 16 // dtype.itemsize, "COLUMNS": variant.dtype == "bf16",
    }  # fmt: skip
    return {n: c for n, c in (constants | switches).items() if n not in options}, options


def _kind(name: str, variant: Variant) -> str:
    """Triton's type of a run-time argument."""
    if name in ELEMENT:
        return f"*{variant.dtype}"
    if name in ("Sums", "Pairs", "DPairs") or name in ("States", "Grads"):
        return "*bf16" if variant.dtype == "bf16" else "*fp32"
    if name[0].isupper() and name not in INTEGERS:
        return "*fp32"
    return "fp32" if name in ("scale", "eps", "inverse") else "i32"


def main(quick: bool = False) -> list[Usage]:
    """quick: only the variants that take the most shared memory."""
    found = []
    for capability in CAPABILITIES:
        for variant in QUICK if quick else VARIANTS:
            found.append(compile_variant(capability, variant))
            print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    return found


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
