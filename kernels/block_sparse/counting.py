"""What a plan visits and attends, counted: densities, the token mask, the complement.

Letters as in plan.py. Everything here reads values, so it waits for the device; none of it is on the path of a call.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveal.kernels.block_sparse.checks import PlanError

if TYPE_CHECKING:
    from foveal.kernels.block_sparse.plan import BlockPlan

TILE = (128, 64)  # query rows, keys: the nominal tile in which `visited` is counted


def dense_row_mask(plan: BlockPlan) -> Tensor:
    """-> bool [R]"""
    dense = torch.zeros(plan.n_q_blocks, dtype=torch.bool, device=plan.device)
    for first, last in plan.dense_rows:
        dense[first:last] = True
    return dense


def _scatter(plan: BlockPlan, first: Tensor | int, last: Tensor) -> Tensor:
    """Blocks in list slots [first, last) -> bool [Bm, Hm, R, C]."""
    k, c = plan.index.shape[-1], plan.n_kv_blocks
    slot = torch.arange(k, device=plan.device)
    low = first[..., None] if isinstance(first, Tensor) else first
    live = (slot >= low) & (slot < last[..., None])
    index, live = torch.broadcast_tensors(plan.index, live)
    out = torch.zeros(*index.shape[:3], c + 1, dtype=torch.bool, device=plan.device)
    out.scatter_(-1, torch.where(live, index, c).long(), True)
    return out[..., :c]


def full_visits(plan: BlockPlan) -> Tensor:
    """-> bool [Bm, Hm, R, C]: visited without a pair mask."""
    return _scatter(plan, 0, plan.n_full) | dense_row_mask(plan)[:, None]


def spread(plan: BlockPlan) -> float:
    """Standard deviation / mean of the lengths of all lists, dense rows included; 0 without lists. Waits for the device."""
    length = torch.where(dense_row_mask(plan), plan.n_kv_blocks, plan.count).double()
    mean = float(length.mean()) if length.numel() else 0.0
    return float(length.std(correction=0)) / mean if mean else 0.0


def visits(plan: BlockPlan) -> Tensor:
    return _scatter(plan, 0, plan.count) | dense_row_mask(plan)[:, None]


def owner_of(start: Tensor, length: Tensor, positions: int) -> Tensor:
    """Block that holds each plan position, -1 where none. -> int64 [Bm, Hm, P]"""
    start, length = torch.broadcast_tensors(start, length)
    p = torch.arange(positions, device=start.device)
    key = torch.where(length > 0, start, positions)
    order = torch.argsort(key, dim=-1, stable=True)
    sorted_start = key.gather(-1, order).contiguous()
    at = (
        torch.searchsorted(
            sorted_start, p.expand(*start.shape[:2], positions).to(sorted_start.dtype).contiguous(), right=True
        )
        - 1
    )
    block = order.gather(-1, at.clamp(min=0))
    inside = (at >= 0) & (p < start.gather(-1, block) + length.gather(-1, block)) & (p >= start.gather(-1, block))
    return torch.where(inside, block, -1)


def position_mask(plan: BlockPlan) -> Tensor:
    """Attended pairs over plan positions. -> bool [Bm, Hm, Pq, Pk]"""
    rows = owner_of(plan.q_start, plan.q_len, plan.q_positions)
    cols = owner_of(plan.kv_start, plan.kv_len, plan.kv_positions)
    full, some = full_visits(plan), visits(plan)
    if plan.block_bias is not None:
        alive = plan.block_bias > -torch.inf
        full, some = full & alive, some & alive
    lead = torch.broadcast_shapes(rows.shape[:2], cols.shape[:2], full.shape[:2])
    rows, cols = rows.expand(*lead, -1), cols.expand(*lead, -1)
    r, c = plan.n_q_blocks, plan.n_kv_blocks

    def spread(x: Tensor) -> Tensor:  # [.., R, C] -> [.., Pq, Pk]
        x = x.expand(*lead, r, c).gather(2, rows.clamp(min=0)[..., None].expand(*lead, -1, c))
        x = x.gather(3, cols.clamp(min=0)[:, :, None].expand(*lead, rows.shape[-1], -1))
        return x & (rows >= 0)[..., None] & (cols >= 0)[:, :, None]

    mask = spread(full)
    if plan.has_pair_masks:
        mask = mask | (spread(some & ~full) & pair_mask(plan, cols, lead))
    if plan.key_bias is not None:
        mask = mask & (plan.key_bias > -torch.inf)[:, :, None]
    return mask


def pair_mask(plan: BlockPlan, cols: Tensor, lead: torch.Size) -> Tensor:
    """The pair masks of partial entries at every position. cols [.., Pk] owner block -> bool [.., Pq, Pk]"""
    ok = torch.ones(*lead, plan.q_positions, cols.shape[-1], dtype=torch.bool, device=plan.device)
    if plan.box is not None:
        for low, high, coord in zip(plan.box.low, plan.box.high, plan.box.coord, strict=True):
            ok = ok & (low[:, None] <= coord) & (coord < high[:, None])
    if plan.row_bits is not None:
        block = cols.clamp(min=0)
        words = plan.row_bits.expand(*lead, -1, -1).gather(
            -1, (block // 32)[:, :, None].expand(*lead, plan.q_positions, -1)
        )
        ok = ok & ((words >> (block % 32)[:, :, None]) & 1).bool()
    return ok


def token_mask(plan: BlockPlan) -> Tensor:
    mask = position_mask(plan)
    if plan.ordered:
        return mask
    for dim, order, n in ((2, plan.q_order, plan.n_queries), (3, plan.kv_order, plan.n_keys)):
        if order is None:
            continue
        order = order.reshape(*([1] * (3 - order.ndim)), *order.shape)
        lead = torch.broadcast_shapes(mask.shape[:2], order.shape[:2])
        mask, order = mask.expand(*lead, *mask.shape[2:]), order.expand(*lead, -1).long()
        shape = list(mask.shape)
        shape[dim] = n + 1
        where = torch.where(order < 0, n, order)
        where = where[..., None] if dim == 2 else where[:, :, None]
        out = torch.zeros(shape, dtype=torch.bool, device=mask.device)
        mask = out.scatter_(dim, where.expand(mask.shape), mask).narrow(dim, 0, n)
    return mask


def _effective(start: Tensor, length: Tensor, live: Tensor) -> Tensor:
    """Live positions inside each block. live bool [.., P] -> float64 [Bm, Hm, n]"""
    start, length = torch.broadcast_tensors(start, length)
    lead = torch.broadcast_shapes(start.shape[:2], live.shape[:-1])
    total = torch.nn.functional.pad(live.double().cumsum(-1), (1, 0)).expand(*lead, -1)
    start, stop = start.expand(*lead, -1).long(), (start + length).expand(*lead, -1).long()
    return total.gather(-1, stop) - total.gather(-1, start)


def _live(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    def side(order: Tensor | None, positions: int) -> Tensor:
        if plan.ordered or order is None:
            return torch.ones(1, 1, positions, dtype=torch.bool, device=plan.device)
        return (order >= 0).reshape(*([1] * (3 - order.ndim)), *order.shape)

    q, k = side(plan.q_order, plan.q_positions), side(plan.kv_order, plan.kv_positions)
    return q, k if plan.key_bias is None else k & (plan.key_bias > -torch.inf)


def attended_pairs(plan: BlockPlan) -> float:
    """Pairs attended after every mask, mean over batch and heads."""
    if plan.pairs is not None:
        return float(plan.pairs)
    q_live, k_live = _live(plan)
    q_n = _effective(plan.q_start, plan.q_len, q_live)
    k_n = _effective(plan.kv_start, plan.kv_len, k_live)
    full, some = full_visits(plan), visits(plan)
    if plan.block_bias is not None:
        alive = plan.block_bias > -torch.inf
        full, some = full & alive, some & alive
    total = (q_n[..., None] * full * k_n[:, :, None]).sum((-1, -2)).mean().item()
    partial = some & ~full
    return total + (_partial_pairs(plan, partial, q_live, k_live) if bool(partial.any()) else 0.0)


def _partial_pairs(plan: BlockPlan, partial: Tensor, q_live: Tensor, k_live: Tensor) -> float:
    """Partial entries one query block at a time: linear memory."""
    lead = torch.broadcast_shapes(
        partial.shape[:2], q_live.shape[:2], k_live.shape[:2], plan.q_start.shape[:2], plan.kv_start.shape[:2]
    )
    at = lambda x, b, h: x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]  # noqa: E731
    total = 0
    for b in range(lead[0]):
        for h in range(lead[1]):
            ks, kn = at(plan.kv_start, b, h).tolist(), at(plan.kv_len, b, h).tolist()
            qs, qn, mine = at(plan.q_start, b, h).tolist(), at(plan.q_len, b, h).tolist(), at(partial, b, h)
            for r in range(plan.n_q_blocks):
                blocks = mine[r].nonzero()[:, 0].tolist()
                if not blocks or not qn[r]:
                    continue
                rows = torch.arange(qs[r], qs[r] + qn[r], device=plan.device)
                keys = torch.cat([torch.arange(ks[c], ks[c] + kn[c], device=plan.device) for c in blocks])
                owner = torch.cat([torch.full((kn[c],), c, device=plan.device) for c in blocks])
                ok = at(q_live, b, h)[rows][:, None] & at(k_live, b, h)[keys]
                if plan.box is not None:
                    for low, high, coord in zip(plan.box.low, plan.box.high, plan.box.coord, strict=True):
                        ok &= (low[rows, None] <= coord[keys]) & (coord[keys] < high[rows, None])
                if plan.row_bits is not None:
                    ok &= ((at(plan.row_bits, b, h)[rows][:, owner // 32] >> (owner % 32)) & 1).bool()
                total += int(ok.sum())
    return total / (lead[0] * lead[1])


def visited_pairs(plan: BlockPlan, tile: tuple[int, int] = TILE) -> float:
    """Pairs in executed tiles, padding of tiles included, mean over batch and heads."""
    rows = -(-plan.q_len // tile[0]) * tile[0]
    keys = -(-plan.kv_len // tile[1]) * tile[1]
    return (rows.double()[..., None] * visits(plan) * keys.double()[:, :, None]).sum((-1, -2)).mean().item()


def complement(plan: BlockPlan) -> BlockPlan:
    if bool((plan.n_full < plan.count).any()):
        raise PlanError(
            "complement() needs a plan whose entries are all full; what a pair mask leaves out of a block is no block."
        )
    rest = ~visits(plan)
    count = rest.sum(-1, dtype=torch.int32)
    width = max(1, int(count.max()) if count.numel() else 1)
    index = torch.argsort((~rest).to(torch.int8), dim=-1, stable=True)[..., :width].to(torch.int32)
    return dataclasses.replace(
        plan, count=count, n_full=count, index=index, dense_rows=(), box=None, row_bits=None, proxies=None, spread=None,
        list_order="address", pairs=None, label=f"complement of {plan.label or 'plan'}",
    )  # fmt: skip
