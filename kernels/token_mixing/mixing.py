"""The mix of two branches: one pass that norms the heads of both, opens a gate between them, and activates.

Letters: B batch, N tokens, H heads, V width of a head, D = H V.

Notable choices: everything between the loads and the store is fp32; the backward makes the norms again from its inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.token_mixing import dispatch, reference
from foveal.kernels.token_mixing.launching import Form, Operator, ceil, shared

ELEMENTS = 1024  # of a tile
PARTS = 352  # parts of the tokens in a backward


def mix_branches(
    local: Tensor, seen: Tensor, logits: Tensor, local_weight: Tensor, seen_weight: Tensor, *, bias: Tensor | None = None,
    local_eps: float = 1e-6, seen_eps: float = 1e-6, silu: bool = False, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """``act(lerp(norm(local), norm(seen), sigmoid(logits + bias)))``, the norms being RMS norms of heads.

    local, logits               [B, N, D], views with last stride 1 allowed; logits fit ``seen``'s dtype or any other float
    seen                        [B, H, N, V] with any strides but the last, which is 1
    local_weight, seen_weight   [V], shared by the heads; bias [D]
    silu                        the activation is SiLU, else none
    -> [B, N, D] in local's dtype. Differentiable. ValueError in one sentence for shapes that do not fit.
    """
    b, n, d = local.shape
    if seen.shape[0] != b or seen.shape[2] != n or seen.shape[1] * seen.shape[3] != d or logits.shape != local.shape:
        raise ValueError(
            f"local {tuple(local.shape)}, logits {tuple(logits.shape)} and seen {tuple(seen.shape)} do not fit; they are [B, N, H * V] "
            "twice and [B, H, N, V]."
        )
    tensors = (local, seen, logits, bias, local_weight, seen_weight)
    if not dispatch.fused(implementation, *tensors):
        return reference.mix_branches(*tensors, local_eps, seen_eps, silu)
    return _operator(*tensors, local_eps, seen_eps, silu)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=256)
def _form(heads: int, values: int, silu: bool, bias: bool, backward: bool) -> Form:
    from foveal.kernels.token_mixing.norm_kernels import mix, mix_backward

    width = 1 << (values - 1).bit_length()
    tile = {"H": heads, "V": values, "VP": width, "ROWS": max(1, ELEMENTS // width)}
    return Form(mix_backward if backward else mix, tile | {"HAS_BIAS": bias, "SILU": silu}, num_warps=4)


def _strides(local: Tensor, seen: Tensor, logits: Tensor) -> tuple[int, ...]:
    return *local.stride()[:2], *seen.stride()[:3], *logits.stride()[:2]


def _run(
    local: Tensor, seen: Tensor, logits: Tensor, bias: Tensor | None, local_weight: Tensor, seen_weight: Tensor,
    local_eps: float, seen_eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    local, seen, logits = _dense(local), _dense(seen), _dense(logits)
    y = torch.empty(local.shape, dtype=local.dtype, device=local.device)
    b, heads, n, values = seen.shape
    if y.numel():
        form = _form(heads, values, silu, bias is not None, False)
        tensors = (local, seen, logits, local_weight if bias is None else bias, local_weight, seen_weight, y)
        programs = ceil(b * n, form.constants["ROWS"]) * heads
        form(programs, tensors, _strides(local, seen, logits), (b * n, n), (local_eps, seen_eps))
    return y


def _fake(
    local: Tensor, seen: Tensor, logits: Tensor, bias: Tensor | None, local_weight: Tensor, seen_weight: Tensor,
    local_eps: float, seen_eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    return local.new_empty(local.shape)


def _gradients(
    grad: Tensor, local: Tensor, seen: Tensor, logits: Tensor, bias: Tensor | None, local_weight: Tensor, seen_weight: Tensor,
    local_eps: float, seen_eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of local, seen and logits, and sums [3, H, V] in fp32: those of both weights by head, and of the bias."""
    local, seen, logits, grad = _dense(local), _dense(seen), _dense(logits), grad.contiguous()
    b, heads, n, values = seen.shape
    d_local, d_logits = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (local, logits))
    d_seen = torch.empty_like(seen)
    form = _form(heads, values, silu, bias is not None, True)
    parts, per = shared(b * n, PARTS, form.constants["ROWS"])
    sums = torch.empty(3, parts, heads, values, dtype=torch.float32, device=seen.device)
    if parts:
        tensors = (
            local,
            seen,
            logits,
            local_weight if bias is None else bias,
            local_weight,
            seen_weight,
            grad,
            d_local,
            d_seen,
            d_logits,
            sums,
        )
        strides = (*_strides(local, seen, logits), *d_seen.stride()[:3])
        form(parts * heads, tensors, strides, (b * n, n, per), (local_eps, seen_eps))
    return d_local, d_seen, d_logits, sums.sum(1)


def _fake_gradients(
    grad: Tensor, local: Tensor, seen: Tensor, logits: Tensor, bias: Tensor | None, local_weight: Tensor, seen_weight: Tensor,
    local_eps: float, seen_eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sums = seen.new_empty((3, seen.shape[1], seen.shape[3]), dtype=torch.float32)
    return local.new_empty(local.shape), torch.empty_like(seen), logits.new_empty(logits.shape), sums


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.local_eps, ctx.seen_eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    _, _, _, bias, local_weight, seen_weight = ctx.saved_tensors
    d_local, d_seen, d_logits, sums = _gradient_operator(
        grad, *ctx.saved_tensors, ctx.local_eps, ctx.seen_eps, ctx.silu
    )
    d_near, d_far = sums[:2].sum(1).unbind()
    d_bias = None if bias is None else sums[2].flatten().to(bias.dtype)
    return (
        d_local,
        d_seen,
        d_logits,
        d_bias,
        d_near.to(local_weight.dtype),
        d_far.to(seen_weight.dtype),
        None,
        None,
        None,
    )


_operator = Operator("mix_branches", _run, _fake, _setup, _backward)
_gradient_operator = Operator("mix_branches_backward", _gradients, _fake_gradients)
