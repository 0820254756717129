"""Gated linear attention as its recurrence, one token at a time: the oracle of every other implementation.

Letters: B batch, H heads, N tokens, K key width, V value width, G gate width (K, or 1 for one gate a head).
Source: "Gated Linear Attention Transformers with Hardware-Efficient Training", equation 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and states are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float, state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``h <- exp(gate_t) h + k_t v_t``, then ``out_t = scale * q_t h``: a token sees itself with weight one.

    q, k [B, H, N, K]; v [B, H, N, V]; gate [B, H, N, G], natural log; state [B, H, K, V]. -> (out in the wide dtype
    [B, H, N, V], state after the last token read). ``reverse`` reads tokens from the last to the first. Differentiable.
    """
    b, h, n, width = q.shape
    q, k, v, gate = (x.to(wide(q.dtype)) for x in (q, k, v, gate))
    held = q.new_zeros(b, h, width, v.shape[-1]) if state is None else state.to(q.dtype)
    out: list[Tensor] = [held.new_zeros(0)] * n
    for t in range(n - 1, -1, -1) if reverse else range(n):
        held = gate[:, :, t].exp()[..., None] * held + k[:, :, t, :, None] * v[:, :, t, None, :]
        out[t] = scale * (q[:, :, t, :, None] * held).sum(-2)
    return torch.stack(out, 2), held


def both_recurrences(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum over the directions that have a gate. The state returned is that of the only direction, or the forward one."""
    parts = []
    if forward is not None:
        parts.append(recurrence(q, k, v, forward, scale, state))
    if backward is not None:
        parts.append(recurrence(q, k, v, backward, scale, state if forward is None else None, reverse=True))
    out = parts[0][0] if len(parts) == 1 else parts[0][0] + parts[1][0]
    return out.to(v.dtype), parts[0][1]
