"""A BlockPlan seen from its grid: for every query token, what becomes of every key token. Plain numpy.

Letters: R query blocks, C key blocks, N query tokens, M key tokens, A mask axes, h heads shown.

* Everything is turned from plan positions into row-major tokens here, so that neither the page's script nor the static
  picture knows about orders.
* Lists are stored as one int8 matrix [h, R, C]: 0 not visited, 1 full, 2 partial, 3 pooled proxy. One batch item.
* Tokens that are not on the grid (text, references) keep their place behind ``visual`` and are drawn as a side bar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT, FULL, PARTIAL, PROXY, MASKED = 0, 1, 2, 3, 4
MAX_HEADS, MAX_CELLS = 4, 400_000
STATES = (
    "not visited",
    "full block",
    "partial block, attended",
    "stands in as a pooled proxy",
    "partial block, masked out",
)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PlanView:
    """grid (T, H, W); visual: where its tokens start among the caller's; blocks: -1 where no block holds a token.

    kinds int8 [h, R, C]; q_block [N], k_block [M]; low, high int16 [A, N] and coord int16 [A, M] of the box, or None;
    bits bool [h, N, C] or None; dense_row bool [R].
    """

    grid: tuple[int, int, int]
    visual: int
    q_block: Ints
    k_block: Ints
    kinds: NDArray[np.int8]
    density: float
    visited: float
    label: str
    low: NDArray[np.int16] | None = None
    high: NDArray[np.int16] | None = None
    coord: NDArray[np.int16] | None = None
    bits: NDArray[np.bool_] | None = None
    heads: int = 1

    def states(self, query: int, head: int = 0) -> NDArray[np.int8]:
        """State of every key token for one query token (both in the caller's numbering), see STATES. -> int8 [M]"""
        row = int(self.q_block[query])
        if row < 0:
            return np.zeros(len(self.k_block), np.int8)
        held = self.k_block >= 0
        out = np.where(held, self.kinds[head, row][np.maximum(self.k_block, 0)], NOT).astype(np.int8)
        out[(out == PARTIAL) & ~self._pair(query, head)] = MASKED
        return out

    def _pair(self, query: int, head: int) -> NDArray[np.bool_]:
        ok = np.ones(len(self.k_block), bool)
        if self.low is not None and self.high is not None and self.coord is not None:
            ok &= ((self.low[:, query, None] <= self.coord) & (self.coord < self.high[:, query, None])).all(0)
        if self.bits is not None:
            ok &= self.bits[min(head, len(self.bits) - 1), query][np.maximum(self.k_block, 0)]
        return ok


def plan_view(plan: Any, grid: tuple[int, int, int], visual: int | None = None) -> PlanView | None:
    """From a BlockPlan on the CPU. None if it does not fit the grid or is too large to draw.

    visual: first visual token among the caller's tokens; None: after the dense rows at the start (text before the grid).
    """
    size = int(np.prod(grid))
    r, c = plan.n_q_blocks, plan.n_kv_blocks
    q_at, k_at = _order(plan.q_order, plan.n_queries), _order(plan.kv_order, plan.n_keys)
    q_block = _blocks(plan.q_start, plan.q_len, q_at, plan.n_queries)
    visual = _leading_dense(plan, q_block, plan.n_queries - size) if visual is None else visual
    if not 0 < size <= min(plan.n_queries, plan.n_keys) - visual or r * c > MAX_CELLS:
        return None
    heads = min(MAX_HEADS, max(plan.index.shape[1], plan.count.shape[1]))
    box, bits = plan.box, plan.row_bits
    return PlanView(
        grid=grid,
        visual=visual,
        q_block=q_block,
        k_block=_blocks(plan.kv_start, plan.kv_len, k_at, plan.n_keys),
        kinds=np.stack([_kinds(plan, h) for h in range(heads)]),
        density=float(plan.density),
        visited=float(plan.visited),
        label=str(plan.label),
        low=None if box is None else _to_tokens(_numpy(box.low), q_at, plan.n_queries),
        high=None if box is None else _to_tokens(_numpy(box.high), q_at, plan.n_queries),
        coord=None if box is None else _to_tokens(_numpy(box.coord), k_at, plan.n_keys),
        bits=None if bits is None else _bits(bits, q_at, plan.n_queries, c, heads),
        heads=heads,
    )


def _numpy(x: Any) -> NDArray[Any]:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def _lead(x: Any, head: int) -> NDArray[Any]:
    """Batch item 0 and one head (or the shared one) of a [Bm, Hm, ...] tensor."""
    x = _numpy(x)[0]
    return x[min(head, len(x) - 1)]


def _order(order: Any, n: int) -> Ints:
    """Caller's token at each plan position, -1 for padding; under an ordered host, the token before the host permuted."""
    if order is None:
        return np.arange(n)
    order = _numpy(order).astype(np.int64)
    return order.reshape(-1, order.shape[-1])[0]


def _leading_dense(plan: Any, q_block: Ints, most: int) -> int:
    """Tokens at the start of the sequence whose query blocks are dense rows, at most ``most``."""
    dense = np.zeros(plan.n_q_blocks + 1, bool)
    for first, last in plan.dense_rows:
        dense[first:last] = True
    away = np.flatnonzero(~dense[q_block])
    return min(max(0, most), int(away[0]) if len(away) else 0)


def _blocks(start: Any, length: Any, at: Ints, n: int) -> Ints:
    """Block of every caller's token, -1 where none."""
    out = np.full(n, -1, np.int64)
    for i, (s, size) in enumerate(zip(_lead(start, 0).tolist(), _lead(length, 0).tolist(), strict=True)):
        tokens = at[s : s + size]
        out[tokens[(tokens >= 0) & (tokens < n)]] = i
    return out


def _kinds(plan: Any, head: int) -> NDArray[np.int8]:
    r, c = plan.n_q_blocks, plan.n_kv_blocks
    out = np.zeros((r, c), np.int8)
    proxies = getattr(plan, "proxies", None)
    if proxies is not None:
        out[:, _lead(proxies.n, head) > 0] = PROXY
    count, full, index = (_lead(x, head) for x in (plan.count, plan.n_full, plan.index))
    for i in range(r):
        out[i, index[i, : full[i]]] = FULL
        out[i, index[i, full[i] : count[i]]] = PARTIAL
    for first, last in plan.dense_rows:
        out[first:last] = FULL
    if plan.block_bias is not None:
        out[np.broadcast_to(np.isneginf(_lead(plan.block_bias, head)), out.shape)] = NOT
    return out


def _to_tokens(x: NDArray[Any], at: Ints, n: int) -> NDArray[np.int16]:
    """[A, P] in plan positions -> [A, n] by caller's token."""
    out = np.zeros((x.shape[0], n), np.int16)
    live = (at >= 0) & (at < n)
    out[:, at[live]] = x[:, : len(at)][:, live]
    return out


def _bits(bits: Any, at: Ints, n: int, c: int, heads: int) -> NDArray[np.bool_]:
    """[Bm, Hm, Pq, words] int32 -> bool [h, n, C]."""
    out = np.zeros((heads, n, c), bool)
    live = (at >= 0) & (at < n)
    for h in range(heads):
        words = np.ascontiguousarray(_lead(bits, h).astype("<i4"))
        flags = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[:, :c].astype(bool)
        out[h, at[live]] = flags[: len(at)][live]
    return out
