"""What one query block of a plan sees, token by token, in the caller's order.

Letters: P plan positions, R query blocks, C key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, PlanError
from foveal.kernels.block_sparse.counting import full_visits

NOT_VISITED, PROXY, MASKED, PARTIAL, FULL, QUERY = range(6)


@dataclass(frozen=True, eq=False)
class Seen:
    """State of every sequence token for one query block, and the key block each lies in (-1: none). uint8, int64 [keys]."""

    state: np.ndarray
    block: np.ndarray
    query_block: int


def seen_from(plan: BlockPlan, query: int | None = None, batch: int = 0, head: int = 0) -> Seen:
    """What a query block visits, per caller's token.

    query   a token of the caller's sequence; None: the middle query block that is not a dense row
    Raises ``PlanError`` where no block holds the query.
    """
    start, length = _row(plan.q_start, batch, head), _row(plan.q_len, batch, head)
    q_token = _tokens(plan, "q", batch, head)
    r = _middle_block(plan) if query is None else _block_of(int(np.flatnonzero(q_token == query)[0]), start, length)
    position = int(start[r] + length[r] // 2) if query is None else int(np.flatnonzero(q_token == query)[0])
    visited = np.asarray(picked(plan.visits(), batch, head)[r].cpu())
    full = np.asarray(picked(full_visits(plan), batch, head)[r].cpu())
    k_token = _tokens(plan, "kv", batch, head)
    state = np.zeros(plan.n_keys, np.uint8)
    block = np.full(plan.n_keys, -1, np.int64)
    for c, (at, n) in enumerate(zip(_row(plan.kv_start, batch, head), _row(plan.kv_len, batch, head), strict=True)):
        where = np.arange(at, at + n)
        real = where[k_token[where] >= 0]
        mine = k_token[real]
        block[mine] = c
        if full[c]:
            state[mine] = FULL
        elif visited[c]:
            state[mine] = np.where(_attended(plan, position, real, c, batch, head), PARTIAL, MASKED)
        elif plan.proxies is not None and float(picked(plan.proxies.n, batch, head)[c]) > 0:
            state[mine] = PROXY
    return Seen(state, block, r)


def query_tokens(plan: BlockPlan, block: int, batch: int = 0, head: int = 0) -> np.ndarray:
    """The caller's tokens of a query block."""
    start, length = _row(plan.q_start, batch, head)[block], _row(plan.q_len, batch, head)[block]
    mine = _tokens(plan, "q", batch, head)[start : start + length]
    return mine[mine >= 0]


def picked(x: Tensor, batch: int, head: int) -> Tensor:
    """[Bm, Hm, ...] -> the entry of a batch item and head."""
    return x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)]


def _row(x: Tensor, batch: int, head: int) -> np.ndarray:
    return picked(x, batch, head).cpu().numpy()


def _tokens(plan: BlockPlan, side: str, batch: int, head: int) -> np.ndarray:
    """Caller's token at every plan position, -1 for padding; under an ordered host, the token before the host permuted."""
    order = plan.q_order if side == "q" else plan.kv_order
    if order is None:
        return np.arange(plan.n_queries if side == "q" else plan.n_keys)
    return (order if order.ndim == 1 else picked(order, batch, head)).cpu().numpy()


def _middle_block(plan: BlockPlan) -> int:
    dense = {r for first, last in plan.dense_rows for r in range(first, last)}
    sparse = [r for r in range(plan.n_q_blocks) if r not in dense]
    if not plan.n_q_blocks:
        raise PlanError("the plan has no query block to show.")
    return sparse[len(sparse) // 2] if sparse else plan.n_q_blocks // 2


def _block_of(position: int, start: np.ndarray, length: np.ndarray) -> int:
    inside = np.flatnonzero((start <= position) & (position < start + length))
    if not len(inside):
        raise PlanError(f"no query block holds plan position {position}.")
    return int(inside[0])


def _attended(plan: BlockPlan, position: int, keys: np.ndarray, block: int, batch: int, head: int) -> np.ndarray:
    """Pair masks of a partial entry at one query position. -> bool [keys]"""
    ok = np.ones(len(keys), bool)
    if plan.box is not None:
        low, high = plan.box.low[:, position].cpu().numpy()[:, None], plan.box.high[:, position].cpu().numpy()[:, None]
        coord = plan.box.coord.cpu().numpy()[:, keys]
        ok &= ((low <= coord) & (coord < high)).all(0)
    if plan.row_bits is not None:
        word = int(picked(plan.row_bits, batch, head)[position, block // 32])
        ok &= bool((word >> (block % 32)) & 1)
    return ok
