"""Calling the Hopper kernel: where rows of queries and keys lie for TMA, and the plan as pointers and strides.

Letters as in plan.py; D head dim, DP head dim in the kernel, BN keys of a tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foveal.kernels.block_sparse.hopper import block_sparse_hopper
from foveal.kernels.block_sparse.launching import PlanArguments, Started, empty_outputs, keys_in_order, launch
from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.block_sparse.plan_forms import (
    as_order,
    cell_width,
    cells,
    derived,
    every_block,
    lead,
    listed_words,
    packed_box,
    row_facts,
    stride_of,
)
from foveal.kernels.block_sparse.tiles import SPECIALISED_BLOCKS, hopper_keys, row_table

LOG2E = 1.4426950408889634
RING = {(64, 64): 6, (64, 128): 4, (128, 64): 4, (128, 128): 2}  # tiles in the ring by (DP, BN): 200 KB in all, or less
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
UNEVEN = 0.08  # share of the time that waiting for the unluckiest program may take
ROWS = 64  # query rows of a consumer
TABLES = 6  # of queries, keys, values, and proxies' keys, values and variances
ABSENT = 1  # in place of a table: an argument that is 1 is compiled in, so what is not there costs nothing
PROXY_PLACES = tuple(f"{name}_{x}" for name in ("pk", "pv", "var") for x in ("row_b", "row_h", "col_h"))


class Rows(NamedTuple):
    """Tokens as rows of one table: the descriptor, and where batch and head begin (rows, rows, columns)."""

    table: TensorDescriptor
    row_b: int
    row_h: int
    col_h: int


def rows_of(x: Tensor, tile: int, dim: int) -> Rows | None:
    """x [B, H, N, D] -> its TMA table in tiles of [tile, dim], or None where its rows are no table."""
    table = row_table(x.shape, x.stride())
    if table is None or x.data_ptr() % 16:
        return None
    n_rows, n_columns, row_b, row_h, col_h = table
    return Rows(described(x, [n_rows, n_columns], [x.stride(2), 1], [tile, dim]), row_b, row_h, col_h)


def described(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """A ``TensorDescriptor`` that skips its own checks, which cost more than all of ours: ``row_table`` has answered them."""
    table = object.__new__(TensorDescriptor)
    table.base, table.shape, table.strides, table.block_shape, table.layout = (
        x,
        shape,
        strides,
        block,
        _layout(*block, x.dtype),
    )
    return table


def certain_rows(x: Tensor, tile: int, dim: int) -> Rows:
    """``rows_of``, through a copy where x is no table: calls check before, compiled graphs cannot see alignment."""
    rows = rows_of(x, tile, dim) or rows_of(x.clone(memory_format=torch.contiguous_format), tile, dim)
    assert rows is not None  # contiguous, and its head dim is a multiple of 8
    return rows


@functools.lru_cache(maxsize=32)
def _layout(tile: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([tile, dim], DTYPES[dtype])


@functools.lru_cache(maxsize=16)
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_for(items: int, spread: float | None, processors: int) -> int:
    """One program on every multiprocessor, which takes every n-th item; or one an item, where that would leave some with much more work.

    Staying saves a start per item, but shares work out in advance. Sums of
    items / processors lengths differ by about 2.5 standard deviations between the luckiest and the unluckiest.
    """
    if items <= processors:
        return items
    uneven = spread is None or 2.5 * spread * (processors / items) ** 0.5 > UNEVEN
    return items if uneven else processors


class Seen(NamedTuple):
    """A kind of call that a plan has seen: q_tma, whether queries come by TMA; shapes, the tables of q (or of k for it), k, v and proxies."""

    started: Started
    q_tma: bool
    shapes: tuple[tuple[list[int], list[int], list[int]], ...]


def pooled(plan: BlockPlan, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Proxies' keys, values and variances, as far as there are any, in the keys' dtype, which tensor cores need."""
    if plan.proxies is None or not plan.n_kv_blocks:
        return ()
    found = (plan.proxies.k, plan.proxies.v, plan.proxies.k_var)
    return tuple(x.to(dtype) for x in found if x is not None)


def proxy_arguments(plan: BlockPlan, keys: int) -> dict[str, Any]:
    """What the kernel asks of proxies besides their tables, by name."""
    here = plan.proxies is not None and plan.n_kv_blocks > 0
    n = plan.proxies.n.float().contiguous() if here and plan.proxies is not None else None
    listed = derived(plan, "listed_words", listed_words) if here else None
    strides = zip(("pn_b", "pn_h", "li_b", "li_h"), (*lead(n), *lead(listed)), strict=True)
    return {
        "ProxyN": plan.index if n is None else n, "Listed": plan.index if listed is None else listed, **dict(strides),
        "C": plan.n_kv_blocks, "pooled": -(-plan.n_kv_blocks // keys), "PROXIES": here,
        "VAR": here and plan.proxies is not None and plan.proxies.k_var is not None,
    }  # fmt: skip


def plan_arguments(plan: BlockPlan, keys: int) -> PlanArguments:
    q_order = None if plan.ordered or plan.q_order is None else as_order(plan, plan.q_order)
    every = derived(plan, "every_block", every_block) if plan.dense_rows else None
    facts = derived(plan, "row_facts", row_facts)
    c = plan.n_kv_blocks
    uniform = plan.kv_stride > 0 and c >= SPECIALISED_BLOCKS
    tiled = uniform and bool(plan.tiled)
    width = cell_width(plan, keys)
    whole = tiled and plan.kv_positions % plan.kv_stride == 0
    careful = plan.has_pair_masks or any(x is not None for x in (plan.block_bias, plan.key_bias, plan.proxies))
    low, high, coord, hot, dims, guard = _box(plan, keys, width)
    block_strides = (0, 0, 0) if plan.block_bias is None else tuple(stride_of(plan.block_bias, i) for i in range(3))
    pointers = (
        plan.kv_start, plan.kv_len, plan.index, facts, every, q_order, low, high, coord, hot, dims, plan.row_bits, plan.block_bias, plan.key_bias,
    )  # fmt: skip
    strided = (plan.kv_start, plan.kv_len, facts, q_order, plan.row_bits)
    programs = -(-plan.max_q_len // (2 * ROWS))
    return PlanArguments(
        pointers=tuple(plan.index if x is None else x for x in pointers),
        strides=(*(s for x in strided for s in lead(x)), *block_strides, *lead(plan.key_bias)),
        sizes={
            "PK": plan.kv_positions, "PQ": plan.q_positions, "WORDS": (c + 31) // 32, "kv_stride": plan.kv_stride,
            "ROW_ITEMS": plan.n_q_blocks * programs, "ksub": -(-plan.max_kv_len // keys), "QSUB": programs, "guard": guard,
        },
        switches={
            "EVEN": whole and plan.kv_stride % keys == 0,
            "CUT": tiled and plan.kv_stride == keys and not whole and not careful and plan.list_order == "address",
            "UNIFORM": uniform, "TILED": tiled, "HAS_PARTIAL": plan.has_pair_masks, "BOX": plan.box is not None, "CELLS": width,
            "BITS": plan.row_bits is not None, "BLOCK_BIAS": plan.block_bias is not None, "KEY_BIAS": plan.key_bias is not None,
            "HAS_DENSE": every is not None, "Q_ORDER": q_order is not None, **proxy_arguments(plan, keys),
        },
    )  # fmt: skip


def _box(
    plan: BlockPlan, keys: int, width: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]:
    """A box mask as the kernel reads it: low, high, coord or origin, hot, dims, guard."""
    if width:
        return (*derived(plan, f"cells_{keys}", lambda p: cells(p, keys)), 0)
    box = None if plan.box is None else packed_box(plan)
    return (None, None, None, None, None, 0) if box is None else (box.low, box.high, box.coord, None, None, box.guard)


def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    need_lse: bool,
    init: tuple[Tensor, Tensor] | None = None,
    keys: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in ``block_sparse_attention``; ``keys`` overrides the keys of a tile, 64 or 128 (for tuning and tests)."""
    out, lse = empty_outputs(q, plan, need_lse)
    if plan.n_q_blocks and plan.max_q_len:
        _launch(
            q,
            *keys_in_order(k, v, plan),
            out,
            lse,
            init,
            plan,
            scale,
            keys or derived(plan, "hopper_keys", hopper_keys),
        )
    return out, lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, init: Any, plan: BlockPlan, scale: float, keys: int
) -> None:  # fmt: skip
    init_out, init_lse = (None, None) if init is None else (init[0], init[1].contiguous())
    absent = plan.index
    pointers = [absent if x is None else x for x in (q, out, lse, init_out, init_lse)]
    addresses = [x.data_ptr() for x in pointers]
    layout = (q.stride(), out.stride(), (0, 0, 0, 0) if init_out is None else init_out.stride())
    aligned = [x % 16 == 0 for x in (*addresses, k.data_ptr(), v.data_ptr())]
    before = None if init_out is None or init_lse is None else (init_out.dtype, init_lse.dtype)
    kind = (keys, scale, q.dtype, q.shape, k.shape, k.stride(), v.stride(), lse is None, before, *layout, *aligned)
    calls: dict[Any, Seen] = derived(plan, "hopper_calls", lambda _: {})
    seen = calls.get(kind)
    proxies = pooled(plan, k.dtype)
    if seen is not None:
        bases = (q if seen.q_tma else k, k, v, *proxies)
        tables = [described(x, *shape) for x, shape in zip(bases, seen.shapes, strict=True)]
        return seen.started.again(*tables, *[ABSENT] * (TABLES - len(tables)), *addresses)
    dim = 64 if q.shape[3] <= 64 else 128
    facts = derived(plan, f"hopper_{keys}", lambda p: plan_arguments(p, keys))
    key_rows, value_rows = certain_rows(k, keys, dim), certain_rows(v, keys, dim)
    query_rows = rows_of(q, ROWS, dim) if q.shape[3] == dim and not facts.switches["Q_ORDER"] else None
    q_tma = query_rows is not None
    if query_rows is None:  # the descriptor then gives its layout only
        query_rows = Rows(described(key_rows.table.base, [ROWS, dim], [dim, 1], [ROWS, dim]), 0, 0, 0)
    rows = (query_rows, key_rows, value_rows, *(certain_rows(x, keys, dim) for x in proxies))
    tables = [x.table for x in rows]
    places = [x for row in rows for x in row[1:]]
    items = facts.sizes["ROW_ITEMS"] * q.shape[0] * q.shape[1]
    programs = programs_for(items, plan.spread, _processors(q.device.index))
    started = launch(
        block_sparse_hopper,
        (programs, 1, 1),
        [*tables, *[ABSENT] * (TABLES - len(rows)), *pointers],
        [*facts.pointers, *places[:9], *(x for strides in layout for x in strides), *facts.strides],
        {
            "scale": scale * LOG2E, "items": items, "programs": programs, "H": q.shape[1], "N": q.shape[2], **facts.sizes, "GROUP": q.shape[1] // k.shape[1],
            "D": q.shape[3], "DP": dim, "BN": keys, "ST": RING[dim, keys], "Q_TMA": q_tma, "HAS_INIT": init is not None,
            "NEED_LSE": lse is not None, **dict(zip(PROXY_PLACES, [*places[9:], *[0] * 9], strict=False)), **facts.switches,
        },
        {"num_warps": 4, "maxnreg": 168},
        q.device,
    )  # fmt: skip
    if started is not None and all(x.base is y for x, y in zip(tables[1:], (k, v, *proxies), strict=True)):
        shapes = tuple((x.table.shape, x.table.strides, x.table.block_shape) for x in rows)
        calls[kind] = Seen(started, q_tma, shapes)
