"""Backward of block-sparse attention in PyTorch, one piece at a time: memory of one piece, exact for empty rows.

Letters as in gather.py. With P = exp(S - LSE): dV = P^T dO, dS = P * (dO V^T - sum(dO * O) + dLSE), dQ = scale dS K, dK = scale dS^T Q.
Source: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithm 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.kernels.block_sparse.gather import Piece, lse_dtype, pieces
from foveal.kernels.block_sparse.plan import BlockPlan


class Grads(NamedTuple):
    """Gradients of q, k, v and of the proxies' k and v (None without proxies)."""

    q: Tensor
    k: Tensor
    v: Tensor
    proxy_k: Tensor | None
    proxy_v: Tensor | None


def gather_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> Grads:
    """d_out, q, out [B, H, N, D]; d_lse, lse [B, H, N]; k, v [B, Hkv, M, D]. Key variances are held constant."""
    wide = lse_dtype(q)
    grads = [torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, k, v)]
    pooled: list[Tensor] | None = None
    if plan.proxies is not None:
        pooled = [torch.zeros(x.shape, dtype=wide, device=q.device) for x in (plan.proxies.k, plan.proxies.v)]
    delta = (d_out.to(wide) * out.to(wide)).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse.to(wide)
    for piece in pieces(q, k, v, plan, scale):
        _piece_backward(piece, d_out, delta, lse, scale, grads, pooled)
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    if pooled is None:
        return Grads(dq, dk, dv, None, None)
    assert plan.proxies is not None
    return Grads(dq, dk, dv, pooled[0].to(plan.proxies.k.dtype), pooled[1].to(plan.proxies.v.dtype))


def _piece_backward(
    piece: Piece,
    d_out: Tensor,
    delta: Tensor,
    lse: Tensor,
    scale: float,
    grads: list[Tensor],
    pooled: list[Tensor] | None,
) -> None:
    wide = grads[0].dtype
    _, h, n, rows, dim = piece.q.shape
    hk = piece.k.shape[1]
    fold = lambda x: x.unflatten(1, (hk, h // hk))  # noqa: E731  [b, hk, G, n, L, ..]
    q = fold(piece.q).to(wide)
    k, v = piece.k[:, :, None].to(wide), piece.v[:, :, None].to(wide)
    do, dl, ls = (fold(_rows_of(piece, x).unflatten(2, (n, rows))).to(wide) for x in (d_out, delta, lse))
    scores = q @ k.mT * scale
    if piece.bias is not None:
        scores = scores + piece.bias.to(wide)
    p = torch.exp(scores - torch.where(ls == -torch.inf, torch.inf, ls)[..., None])
    ds = p * (do @ v.mT - dl[..., None])
    dq, dk, dv = (ds @ k * scale), (ds.mT @ q * scale).sum(2), (p.mT @ do).sum(2)
    d = grads[0].shape[-1]
    if dim > d:  # [q, q^2]: the proxies' variance term
        dq = dq[..., :d] + 2 * q[..., :d] * dq[..., d:]
    bs, hs = piece.heads
    _add(grads[0][bs, hs], piece.rows, dq.flatten(1, 2).flatten(2, 3))
    for into, d_keys in zip(grads[1:], (dk[..., :d], dv), strict=True):
        target = into[bs, piece.key_heads]
        target.index_add_(2, piece.key_rows.clamp(min=0), d_keys[:, :, :, : piece.listed].flatten(2, 3))
    if pooled is not None:
        for into, d_keys in zip(pooled, (dk[..., :d], dv), strict=True):
            into[bs, piece.key_heads] += d_keys[:, :, :, piece.listed :].sum(2)


def _rows_of(piece: Piece, x: Tensor) -> Tensor:
    x = x[piece.heads[0], piece.heads[1]]
    return x[:, :, piece.rows] if isinstance(piece.rows, slice) else x.index_select(2, piece.rows.clamp(min=0))


def _add(target: Tensor, rows: Tensor | slice, grad: Tensor) -> None:
    if isinstance(rows, slice):
        target[:, :, rows] += grad
    else:
        live = (rows >= 0).to(grad.dtype)[:, None]
        target.index_add_(2, rows.clamp(min=0), grad * live)
