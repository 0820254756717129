"""Compile every kernel here for GPUs that need not be present, and report what each takes.

``python -m foveal.kernels.token_mixing.compiling`` prints one JSON line per kernel: shared memory, registers, spills.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveal.kernels.block_sparse.compiling import CAPABILITIES, assembled
from foveal.kernels.token_mixing import convolution, gating, mixing, mlp, norm, stem
from foveal.kernels.token_mixing.launching import Form

LARGE = (90, 100)  # chips that take the kernel of narrow blocks
FP32 = ("Sums", "BiasSums")
REAL = ("eps", "l_eps", "s_eps", "inverse")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes. shared in bytes, registers per thread, spill in bytes.

    specialised_sizes: integers, not strides, that Triton would compile anew for; ``launching`` counts on there being none.
    """

    capability: int
    kernel: str
    dtype: str
    shared: int
    registers: int
    spill: int
    specialised_sizes: list[str]


def forms(width: int) -> dict[str, Form]:
    """The kernels with their compile-time arguments, as ViG of that width (heads of 64) uses them."""
    heads, hidden = width // 64, 8 * width // 3
    return {
        "convolve 3": convolution._form(width, 3, True, True, False, False),
        "convolve 5": convolution._form(width, 5, False, True, False, False),
        "convolve, gradient": convolution._form(width, 3, True, True, True, False),
        "weight_gradients 3": convolution._gradient_form(width, 3, True),
        "weight_gradients 5": convolution._gradient_form(width, 5, True),
        "norm": norm._form(width, True),
        "norm_backward": norm._gradient_form(width, True, True),
        "mix": mixing._form(heads, 64, True, True, False),
        "mix_backward": mixing._form(heads, 64, True, True, True),
        "log_gates": gating._gates_form(16, width, True, False, False),
        "log_gates, gradient": gating._gates_form(16, width, True, True, False),
        "swiglu": gating._swiglu_form(hidden, False),
        "swiglu, gradient": gating._swiglu_form(hidden, True),
        "mix_and_mlp": mlp.form(width, hidden, 64, True),
        "patch_conv": stem._form(3, 9, 8, 1, width // 2, False),
    }


def compile_form(capability: int, name: str, form: Form, dtype: str) -> Usage:
    names, constants = form.kernel.arg_names, form.constants
    signature = {n: "constexpr" if n in constants else _kind(n, name, dtype) for n in names}
    even = [i for i, n in enumerate(names) if signature[n].startswith("*") or (n[1:2] == "_" and signature[n] == "i32")]
    source = ASTSource(
        form.kernel, signature, {(names.index(n),): c for n, c in constants.items()}, {(i,): [["tt.divisibility", 16]] for i in even}
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=form.options)
    registers, spill = assembled(made.asm["ptx"], capability)
    sizes = [
        p.name
        for p in form.kernel.params
        if signature[p.name] == "i32" and p.name[1:2] != "_" and not p.do_not_specialize
    ]
    return Usage(capability, name, dtype, made.metadata.shared, registers, spill, sizes)


def _kind(name: str, kernel: str, dtype: str) -> str:
    """Triton's type of a run-time argument."""
    if name in FP32 or (kernel == "log_gates" and name == "Y"):
        return "*fp32"
    if name in REAL:
        return "fp32"
    return f"*{dtype}" if name[0].isupper() and name not in ("T", "N") else "i32"


def main(quick: bool = False) -> list[Usage]:
    """quick: for one chip."""
    found = []
    for capability in (90,) if quick else CAPABILITIES:
        for name, form in forms(192).items():
            if name == "mix_and_mlp" and capability not in LARGE:
                continue
            found.append(compile_form(capability, name, form, "bf16"))
            print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    return found


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
