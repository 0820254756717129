"""Plans and PyTorch's BlockMask, both ways.

Letters: B batch, H heads, N queries, M keys, R query blocks, C key blocks.

* Out: only what a BlockMask can say, uniform blocks and a mask; anything else is refused by name.
* In: ``mask_mod`` is an arbitrary function, so it is **evaluated** on every pair (B x H x N x M booleans for a moment) and the
  key blocks are refined into runs of keys that all queries treat alike. The plan's label says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from foveal.kernels.block_sparse import BlockPlan, PlanError
from foveal.kernels.block_sparse.counting import full_visits


def to_block_mask(plan: BlockPlan) -> BlockMask:
    """The same visits and pair masks for ``flex_attention``, over tensors in plan order.

    Raises ``PlanError`` for what a BlockMask cannot express: blocks of unequal size, orders left to the operator, biases, proxies.
    """
    for name in ("block_bias", "key_bias", "proxies"):
        if getattr(plan, name) is not None:
            raise PlanError(f"the plan has {name}; a BlockMask knows only which pairs are attended.")
    if not plan.ordered and (plan.q_order is not None or plan.kv_order is not None):
        raise PlanError(
            "the plan permutes tokens inside the operator; permute q, k, v first and mark the plan ordered (dataclasses.replace)."
        )
    q_size = _uniform("query", plan.q_start, plan.q_len, plan.n_queries)
    k_size = _uniform("key", plan.kv_start, None, plan.n_keys)
    visited, full = plan.visits(), full_visits(plan)
    room = (plan.n_keys - plan.kv_start).clamp(max=k_size)
    short = (plan.kv_len < room)[:, :, None]  # keys cut off inside a block: a mask, for a BlockMask
    lead = torch.broadcast_shapes(visited.shape[:2], short.shape[:2])
    visited, full = visited.expand(*lead, -1, -1), (full & ~short).expand(*lead, -1, -1)
    part_n, part_i = _listed(visited & ~full)
    full_n, full_i = _listed(full)
    return BlockMask.from_kv_blocks(
        part_n, part_i, full_n, full_i, BLOCK_SIZE=(q_size, k_size),
        mask_mod=_mask_mod(plan, visited, full_visits(plan).expand(*lead, -1, -1), q_size, k_size),
        seq_lengths=(plan.n_queries, plan.n_keys),
    )  # fmt: skip


def _uniform(side: str, start: Tensor, length: Tensor | None, n: int) -> int:
    blocks = start.shape[-1]
    size = int(start.reshape(-1, blocks)[0, 1]) if blocks > 1 else n
    want = torch.arange(blocks, device=start.device) * size
    fits = size > 0 and bool((start == want).all()) and blocks == -(-n // max(1, size))
    if fits and length is not None:
        fits = bool((length == (n - want).clamp(max=size)).all())
    if not fits:
        raise PlanError(
            f"the plan's {side} blocks are not uniform; a BlockMask needs equal blocks that follow each other from position 0."
        )
    return size


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort((~chosen).to(torch.int8), dim=-1, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(plan: BlockPlan, visited: Tensor, full: Tensor, q_size: int, k_size: int) -> Any:
    box, bits, kv_start, kv_len = plan.box, plan.row_bits, plan.kv_start, plan.kv_len

    def at(i: Tensor, size: int) -> Tensor:
        return i if size > 1 else torch.zeros_like(i)

    def plan_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        r, c = q // q_size, k // k_size
        seen = visited[at(b, visited.shape[0]), at(h, visited.shape[1]), r, c]
        inside = (
            k - kv_start[at(b, kv_start.shape[0]), at(h, kv_start.shape[1]), c]
            < kv_len[at(b, kv_len.shape[0]), at(h, kv_len.shape[1]), c]
        )
        pair = torch.ones_like(seen)
        if box is not None:
            for low, high, coord in zip(box.low, box.high, box.coord, strict=True):
                pair = pair & (low[q] <= coord[k]) & (coord[k] < high[q])
        if bits is not None:
            word = bits[at(b, bits.shape[0]), at(h, bits.shape[1]), q, c // 32]
            pair = pair & (((word >> (c % 32)) & 1) == 1)
        return seen & inside & (pair | full[at(b, full.shape[0]), at(h, full.shape[1]), r, c])

    return plan_mask


def from_block_mask(block_mask: BlockMask, n_q: int, n_k: int) -> BlockPlan:
    """A plan that attends exactly the pairs of a BlockMask, for sequences of n_q queries and n_k keys.

    ``mask_mod`` is evaluated on all pairs, so this suits small and medium sequences. Blocks in the full list count as attended
    whole, as ``flex_attention`` treats them. Rows without keys stay empty (output 0).
    Raises ``PlanError`` where the mask is for other lengths.
    """
    q_size, k_size = block_mask.BLOCK_SIZE
    rows, cols = -(-n_q // q_size), -(-n_k // k_size)
    if block_mask.kv_num_blocks.shape[-1] != rows or block_mask.seq_lengths != (n_q, n_k):
        raise PlanError(
            f"the BlockMask is for {block_mask.seq_lengths} tokens; {n_q} queries and {n_k} keys were asked for."
        )
    allowed = _evaluated(block_mask, n_q, n_k, rows, cols)
    edge = torch.arange(n_k, device=allowed.device) % k_size == 0
    edge[1:] |= (allowed[..., 1:] != allowed[..., :-1]).flatten(0, -2).any(0)
    kv_start = edge.nonzero()[:, 0]
    seen = allowed[..., kv_start]  # [B, H, N, C]: all keys of a run are alike
    padded = torch.nn.functional.pad(seen, (0, 0, 0, rows * q_size - n_q)).unflatten(2, (rows, q_size))
    real = (torch.arange(rows * q_size, device=allowed.device) < n_q).view(rows, q_size, 1)
    some, every = padded.any(3), (padded | ~real).all(3)
    q_start = torch.arange(rows, device=allowed.device) * q_size
    rank = 2 - some.to(torch.int8) - every.to(torch.int8)
    count, n_full = (rank < 2).sum(-1), (rank == 0).sum(-1)
    width = max(1, int(count.max()))
    return BlockPlan(
        n_queries=n_q, n_keys=n_k,
        q_start=q_start, q_len=(n_q - q_start).clamp(max=q_size),
        kv_start=kv_start, kv_len=torch.diff(kv_start, append=kv_start.new_tensor([n_k])),
        count=count, n_full=n_full, index=torch.argsort(rank, dim=-1, stable=True)[..., :width],
        row_bits=_packed(seen) if bool((n_full < count).any()) else None,
        label=f"BlockMask, {getattr(block_mask.mask_mod, '__name__', 'mask_mod')} evaluated on every pair",
    )  # fmt: skip


def _evaluated(block_mask: BlockMask, n_q: int, n_k: int, rows: int, cols: int) -> Tensor:
    """-> bool [B, H, N, M]"""
    b, h = block_mask.kv_num_blocks.shape[:2]
    q_size, k_size = block_mask.BLOCK_SIZE

    def tokens(count: Tensor, index: Tensor) -> Tensor:
        live = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        blocks = torch.zeros(b, h, rows, cols + 1, dtype=torch.bool, device=index.device)
        blocks.scatter_(-1, torch.where(live, index, cols).long(), True)
        return blocks[..., :cols].repeat_interleave(q_size, 2).repeat_interleave(k_size, 3)[:, :, :n_q, :n_k]

    allowed = tokens(block_mask.kv_num_blocks, block_mask.kv_indices)
    allowed = allowed & create_mask(block_mask.mask_mod, b, h, n_q, n_k, device=str(allowed.device))
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        allowed = allowed | tokens(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return allowed


def _packed(seen: Tensor) -> Tensor:
    """bool [B, H, N, C] -> int32 [B, H, N, ceil(C / 32)], bit c % 32 of word c // 32."""
    words = -(-seen.shape[-1] // 32)
    wide = torch.nn.functional.pad(seen, (0, words * 32 - seen.shape[-1])).unflatten(-1, (words, 32)).long()
    value = (wide << torch.arange(32, device=seen.device)).sum(-1)
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)
