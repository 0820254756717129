"""Compile every shipped kind of the kernel for GPUs that need not be here, and report what each takes.

``python -m foveal.kernels.query_key.compiling`` prints one JSON line per kernel: shared memory, registers, spills.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveal.kernels.block_sparse.compiling import CAPABILITIES, assembled
from foveal.kernels.query_key.portable import OPTIONS, TILE, norm_rotate_order

KINDS = {"Cos": "*fp32", "Sin": "*fp32", "Order": "*i64", "q_eps": "fp32", "k_eps": "fp32"}
ELEMENT = ("Q", "K", "QWeight", "KWeight", "QOut", "KOut")
WAN, FLUX, HUNYUAN = {"ACROSS", "ROTATE", "SHARED"}, {"ROTATE"}, {"ROTATE", "TWICE"}


@dataclass(frozen=True)
class Variant:
    """on: switches; every variant has weights."""

    dtype: str
    head_dim: int
    on: tuple[str, ...]


VARIANTS = (
    *(Variant("bf16", 128, tuple(sorted(on))) for on in (WAN, FLUX, HUNYUAN, {"TWICE"}, WAN | {"ORDERED"})),
    Variant("fp32", 256, tuple(sorted(HUNYUAN | {"ORDERED"}))),
)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes. shared in bytes, registers per thread, spill in bytes."""

    capability: int
    variant: Variant
    shared: int
    registers: int
    spill: int


def compile_variant(capability: int, variant: Variant) -> Usage:
    names, (bt, bh, warps) = norm_rotate_order.arg_names, TILE
    constants: dict[str, Any] = {n: n in variant.on for n in ("ACROSS", "TWICE", "ROTATE", "SHARED", "ORDERED")}
    constants |= {"D": variant.head_dim, "BT": bt, "BH": bh, "HAS_WEIGHT": True}
    kinds = KINDS | dict.fromkeys(ELEMENT, f"*{variant.dtype}")
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    wide = [i for i, n in enumerate(names) if signature[n].startswith("*") or n.endswith(("_n", "_b"))]
    attrs = {(i,): [["tt.divisibility", 16]] for i in wide}
    source = ASTSource(norm_rotate_order, signature, {(names.index(n),): c for n, c in constants.items()}, attrs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **OPTIONS})
    registers, spill = assembled(made.asm["ptx"], capability)
    return Usage(capability, variant, made.metadata.shared, registers, spill)


def main() -> list[Usage]:
    found = []
    for capability in CAPABILITIES:
        for variant in VARIANTS:
            found.append(compile_variant(capability, variant))
            print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    return found


if __name__ == "__main__":
    main()
