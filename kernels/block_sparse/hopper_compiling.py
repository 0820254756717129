"""Compile every shipped variant of the Hopper kernel on a machine that need not have the chip, and report what it uses.

``python -m foveal.kernels.block_sparse.hopper_compiling`` prints one JSON line per variant: shared memory, registers, spills.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from foveal.kernels.block_sparse.compiling import Usage, assembled
from foveal.kernels.block_sparse.hopper import block_sparse_hopper
from foveal.kernels.block_sparse.hopper_call import RING

SWITCHES = (
    "Q_TMA", "EVEN", "CUT", "UNIFORM", "TILED", "HAS_PARTIAL", "BOX", "CELLS", "BITS", "BLOCK_BIAS", "KEY_BIAS", "HAS_DENSE", "Q_ORDER", "HAS_INIT", "NEED_LSE",
    "PROXIES", "VAR",
)  # fmt: skip
FEATURES: dict[str, set[str]] = {
    "plain": {"EVEN", "UNIFORM", "TILED", "HAS_DENSE", "Q_TMA"},
    "ragged": {"UNIFORM", "TILED", "HAS_DENSE", "NEED_LSE", "Q_TMA"},
    "cut": {"CUT", "UNIFORM", "TILED", "HAS_DENSE", "NEED_LSE", "Q_TMA"},
    "uneven": {"HAS_DENSE", "Q_ORDER"},
    "biased": {"BLOCK_BIAS", "KEY_BIAS", "NEED_LSE"},
    "resumed": {"UNIFORM", "TILED", "HAS_INIT", "NEED_LSE", "Q_TMA"},
    "masked": {"HAS_PARTIAL", "BOX", "UNIFORM", "TILED", "HAS_DENSE", "Q_TMA"},
    "cells": {"HAS_PARTIAL", "BOX", "CELLS", "UNIFORM", "TILED", "HAS_DENSE", "Q_TMA"},
    "everything": set(SWITCHES) - {"EVEN", "CUT", "UNIFORM", "TILED", "CELLS", "Q_TMA", "PROXIES", "VAR"},
    "proxies": {"EVEN", "UNIFORM", "TILED", "PROXIES", "Q_TMA"},
    "variances": {"UNIFORM", "TILED", "HAS_DENSE", "NEED_LSE", "PROXIES", "VAR", "Q_TMA"},
    "resumed proxies": {"HAS_INIT", "NEED_LSE", "BLOCK_BIAS", "PROXIES", "Q_TMA"},
}
VARIANTS = (
    ("bf16", 128, 128, "plain"),
    ("bf16", 128, 128, "ragged"),
    ("bf16", 128, 128, "cut"),
    ("bf16", 64, 128, "cut"),
    ("fp16", 128, 128, "uneven"),
    ("bf16", 128, 64, "biased"),
    ("bf16", 128, 128, "resumed"),
    ("bf16", 64, 128, "plain"),
    ("bf16", 128, 64, "plain"),
    ("bf16", 128, 64, "masked"),
    ("bf16", 128, 128, "cells"),
    ("bf16", 128, 64, "everything"),
    ("bf16", 64, 64, "everything"),
    ("bf16", 128, 128, "proxies"),
    ("bf16", 64, 128, "proxies"),
    ("bf16", 128, 128, "variances"),
    ("fp16", 64, 128, "variances"),
    ("bf16", 128, 64, "resumed proxies"),
)  # dtype, head dim, keys of a tile, feature


def kind_of(name: str, dtype: str, dim: int, keys: int) -> str:
    """The compiler's type of one argument."""
    if name.endswith("_desc"):
        rows = 64 if name == "q_desc" else keys
        layout = gl.NVMMASharedLayout.get_default_for([rows, dim], gl.bfloat16 if dtype == "bf16" else gl.float16)
        return f"tensordesc<{dtype}[{rows},{dim}],{layout!r}>"
    if name in ("Q", "Out", "InitOut"):
        return f"*{dtype}"
    if name == "Hot":
        return "*bf16"
    if name in ("Lse", "InitLse", "BlockBias", "KeyBias", "ProxyN"):
        return "*fp32"
    if name == "scale":
        return "fp32"
    return "*i32" if name[0].isupper() and not name.isupper() else "i32"


def compile_hopper(dtype: str, head_dim: int, keys: int, feature: str) -> Usage:
    dim = 64 if head_dim <= 64 else 128
    constants: dict[str, Any] = {name: name in FEATURES[feature] for name in SWITCHES}
    constants["CELLS"] = 16 * constants["CELLS"]
    constants |= {"D": head_dim, "DP": dim, "BN": keys, "ST": RING[dim, keys], "q_d": 1, "o_d": 1, "io_d": 1}
    absent = () if constants["VAR"] else ("var_desc",) if constants["PROXIES"] else ("pk_desc", "pv_desc", "var_desc")
    constants |= {name: 1 for name in absent}
    names = block_sparse_hopper.arg_names
    signature = {n: "constexpr" if n in constants else kind_of(n, dtype, dim, keys) for n in names}
    wide = [i for i, n in enumerate(names) if signature[n].startswith("*") or _is_stride(n, signature[n])]
    source = GluonASTSource(
        block_sparse_hopper,
        signature,
        {(names.index(n),): c for n, c in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in wide},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168})
    registers, spill = assembled(kernel.asm["ptx"], 90, overlapping=True)
    return Usage(90, dtype, head_dim, f"{feature} {keys}", kernel.metadata.shared, registers, spill)


def _is_stride(name: str, kind: str) -> bool:
    return kind == "i32" and name.split("_")[0] in {"q", "o", "io"}


def main() -> list[Usage]:
    found = []
    for variant in VARIANTS:
        found.append(compile_hopper(*variant))
        print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    return found


if __name__ == "__main__":
    main()
