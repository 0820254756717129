"""A block's gated MLP in one launch, for inference: residual sum, RMS norm, SwiGLU between two projections, second residual sum.

Letters: D width, I hidden width; leading sizes are free.

Notable choices: only for narrow tokens, whose sums fit the registers: there it moves three tensors of tokens where five kernels move
eighteen. Wider ones go through separate products.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.token_mixing import dispatch, reference
from foveal.kernels.token_mixing.launching import Form, Operator, ceil

WIDEST = 192
CHIPS = (9, 10)  # major compute capabilities with more than 160 KB of shared memory for a program
HALF = (torch.float16, torch.bfloat16)
# Of ten tiles the fastest on an H100: 147 us for 65,536 tokens of 192 channels in bf16, where the separate kernels take 235.
TILE: dict[str, Any] = {"BT": 128, "BI": 32, "STAGES": 3, "PRODUCT": "ieee", "num_warps": 8, "num_stages": 3}


def parts(width: int) -> tuple[int, int] | None:
    """width as the sum of two powers of two, the second half of the first or 0; None where it is no such number."""
    first = 1 << max(0, width.bit_length() - 1)
    return (first, width - first) if width in (first, first + first // 2) else None


def takes_gated_mlp(x: Tensor, added: Tensor, *weights: Tensor) -> bool:
    """Whether the one launch is made for these: no gradients, one half precision throughout, narrow tokens, a chip with the memory.

    weights: of the norm, the gate projection [2 I, D] and the projection down [D, I].
    """
    if x.dtype not in HALF or not x.is_cuda or not dispatch.INSTALLED or dispatch.learns(x, added, *weights):
        return False
    if any(t.dtype != x.dtype for t in (added, *weights)) or _misfit(x.shape[-1], weights[-1].shape[-1]):
        return False
    return dispatch.capability(x)[0] in CHIPS


def _misfit(width: int, hidden: int) -> str | None:
    found = parts(width)
    if found is None or width > WIDEST or found[0] < 16 or 0 < found[1] < 16:
        return f"D is {width}; it must be 2^n or 3 * 2^n, 16 to {WIDEST}, in parts of at least 16"
    return f"I is {hidden}; it must be a multiple of {TILE['BI']}" if hidden % TILE["BI"] else None


def gated_mlp(
    x: Tensor, added: Tensor, norm: Tensor, gate_weight: Tensor, down_weight: Tensor, eps: float = 1e-6, *, implementation: str | None = None
) -> Tensor:  # fmt: skip
    """s = x + added; s + (silu(a) * b) down_weight^T, [a, b] = rms_norm(s, norm) gate_weight^T.

    x, added [.., D]; norm [D]; gate_weight [2 I, D]; down_weight [D, I]. -> [.., D] in x's dtype. Where ``takes_gated_mlp`` says no, the same
    is computed step by step, and differentiable. ValueError where the one launch is asked for by name and cannot be made.
    """
    tensors = (x, added, norm, gate_weight, down_weight)
    if implementation is None and not takes_gated_mlp(*tensors):
        return reference.gated_mlp(*tensors, eps)
    if implementation is not None:
        if not dispatch.fused(implementation, *tensors):
            return reference.gated_mlp(*tensors, eps)
        why = "gradients are wanted" if dispatch.learns(*tensors) else _misfit(x.shape[-1], down_weight.shape[-1])
        if why:
            raise ValueError(f"the triton implementation cannot take this call: {why}; leave implementation out.")
    return _operator(*tensors, eps)


@functools.lru_cache(maxsize=256)
def form(width: int, hidden: int) -> Form:
    from foveal.kernels.token_mixing.mlp_kernel import gated_mlp_forward

    tile = dict(TILE)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    d0, d1 = parts(width) or (0, 0)
    return Form(gated_mlp_forward, {"D0": d0, "D1": d1, "I": hidden} | tile, **options)


def _run(x: Tensor, added: Tensor, norm: Tensor, gate_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
    x, added = x.contiguous(), added.contiguous()
    y = torch.empty_like(x)
    count = x.numel() // x.shape[-1]
    if count:
        chosen = form(x.shape[-1], down_weight.shape[-1])
        tensors = (x, added, norm, gate_weight.contiguous(), down_weight.contiguous(), y)
        chosen(ceil(count, chosen.constants["BT"]), tensors, (), (count,), (eps,))
    return y


def _fake(x: Tensor, added: Tensor, norm: Tensor, gate_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_operator = Operator("gated_mlp", _run, _fake)
