"""The oracle: masked softmax over the whole score matrix. Quadratic memory, any device, fp64 where the inputs are fp64.

Letters as in plan.py; D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.block_sparse.counting import owner_of, position_mask, visits
from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.order import take_tokens


def reference_attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, N, D], k, v [B, Hkv, M, D] -> (out [B, H, N, D], lse [B, H, N]) in fp64 for fp64 inputs, else fp32 inside."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h = q.shape[:2]
    qp = take_tokens(q, None if plan.ordered else plan.q_order).to(wide)
    kp, vp = (take_tokens(x, None if plan.ordered else plan.kv_order).to(wide) for x in (k, v))
    group = h // k.shape[1]
    kp, vp = kp.repeat_interleave(group, 1), vp.repeat_interleave(group, 1)
    scores = qp @ kp.mT * scale + _bias(plan).to(wide)
    mask = position_mask(plan)
    scores = scores.masked_fill(~mask, -torch.inf)
    if plan.proxies is not None:
        extra, pv = _proxy_scores(qp, plan, scale, group)
        scores, vp = torch.cat([scores, extra], -1), torch.cat([vp, pv.to(wide)], 2)
    empty = (scores == -torch.inf).all(-1)
    total = torch.logsumexp(
        scores.masked_fill(empty[..., None], 0.0), -1
    )  # finite, so gradients of empty rows are 0, not NaN
    out = torch.exp(scores - total[..., None]) @ vp
    lse = total.masked_fill(empty, -torch.inf)
    out, lse = _untake(out, lse, plan, q.shape[2])
    return out.expand(b, h, -1, -1), lse.expand(b, h, -1)


def _bias(plan: BlockPlan) -> Tensor:
    """Block and key biases at every pair. -> [Bm, Hm, Pq or 1, Pk]"""
    bias = torch.zeros(1, 1, 1, plan.kv_positions, device=plan.device)
    if plan.block_bias is not None:
        rows = owner_of(plan.q_start, plan.q_len, plan.q_positions).clamp(min=0)
        cols = owner_of(plan.kv_start, plan.kv_len, plan.kv_positions).clamp(min=0)
        lead = torch.broadcast_shapes(rows.shape[:2], cols.shape[:2], plan.block_bias.shape[:2])
        wide = plan.block_bias.expand(*lead, plan.n_q_blocks, -1)
        wide = wide.gather(2, rows.expand(*lead, -1)[..., None].expand(*lead, -1, wide.shape[-1]))
        bias = bias + wide.gather(3, cols.expand(*lead, -1)[:, :, None].expand(*lead, wide.shape[2], -1))
    if plan.key_bias is not None:
        bias = bias + plan.key_bias[:, :, None]
    return bias


def _proxy_scores(qp: Tensor, plan: BlockPlan, scale: float, group: int) -> tuple[Tensor, Tensor]:
    """-> scores [B, H, Pq, C], -inf where the block is listed or removed, and values [B, H, C, D]."""
    assert plan.proxies is not None
    pk, pv = (x.repeat_interleave(group, 1).to(qp.dtype) for x in (plan.proxies.k, plan.proxies.v))
    scores = qp @ pk.mT * scale + plan.proxies.n.to(qp.dtype).log()[:, :, None]
    if plan.proxies.k_var is not None:
        var = plan.proxies.k_var.repeat_interleave(group, 1).to(qp.dtype)
        scores = scores + 0.5 * scale**2 * (qp.square() @ var.mT)
    rows = owner_of(plan.q_start, plan.q_len, plan.q_positions)
    listed = visits(plan)
    lead = torch.broadcast_shapes(rows.shape[:2], listed.shape[:2])
    index = rows.clamp(min=0).expand(*lead, -1)[..., None].expand(*lead, -1, plan.n_kv_blocks)
    hidden = listed.expand(*lead, -1, -1).gather(2, index) | (rows < 0).expand(*lead, -1)[..., None]
    if plan.block_bias is not None:
        wide = plan.block_bias.to(qp.dtype).expand(*plan.block_bias.shape[:2], plan.n_q_blocks, -1)
        lead = torch.broadcast_shapes(lead, wide.shape[:2])
        index = rows.clamp(min=0).expand(*lead, -1)[..., None].expand(*lead, -1, plan.n_kv_blocks)
        scores = scores + wide.expand(*lead, -1, -1).gather(2, index)
    return scores.masked_fill(hidden, -torch.inf), pv


def _untake(out: Tensor, lse: Tensor, plan: BlockPlan, n: int) -> tuple[Tensor, Tensor]:
    """Back to the caller's order of queries."""
    if plan.ordered or plan.q_order is None:
        return out, lse
    order = plan.q_order.long()
    order = order.expand(*out.shape[:2], -1)
    where = torch.where(order < 0, n, order)
    full = out.new_zeros(*out.shape[:2], n + 1, out.shape[-1])
    full = full.scatter(2, where[..., None].expand(-1, -1, -1, out.shape[-1]), out)
    flat = lse.new_full((*lse.shape[:2], n + 1), -torch.inf).scatter(2, where, lse)
    return full[:, :, :n], flat[:, :, :n]
