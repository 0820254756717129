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
from foveal.kernels.block_sparse.launching import empty_outputs, keys_in_order, launch, specialised
from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.block_sparse.plan_forms import (
    as_order,
    dense_flags,
    derived,
    every_block,
    launch_order,
    lead,
    packed_box,
    stride_of,
)
from foveal.kernels.block_sparse.tiles import SPECIALISED_BLOCKS, hopper_keys, row_table

LOG2E = 1.4426950408889634
RING = {(64, 64): 6, (64, 128): 4, (128, 64): 4, (128, 128): 2}  # tiles in the ring by (DP, BN): 200 KB in all, or less
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS = 64  # query rows of a consumer


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
    descriptor = TensorDescriptor(x, [n_rows, n_columns], [x.stride(2), 1], [tile, dim], _layout(tile, dim, x.dtype))
    return Rows(descriptor, row_b, row_h, col_h)


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


class PlanArguments(NamedTuple):
    """What a plan gives the kernel, worked out once: pointers, strides, sizes and compile-time switches."""

    pointers: tuple[Tensor, ...]
    strides: tuple[int, ...]
    sizes: dict[str, int]
    switches: dict[str, Any]


def plan_arguments(plan: BlockPlan, keys: int) -> PlanArguments:
    q_order = None if plan.ordered or plan.q_order is None else as_order(plan, plan.q_order)
    dense = derived(plan, "dense_flags", dense_flags) if plan.dense_rows else None
    every = derived(plan, "every_block", every_block) if plan.dense_rows else None
    box = packed_box(plan) if plan.box is not None else None
    c = plan.n_kv_blocks
    uniform = plan.kv_stride > 0 and c >= SPECIALISED_BLOCKS
    tiled = uniform and bool(plan.tiled)
    geometry = (plan.q_start, plan.q_len, plan.kv_start, plan.kv_len, plan.count, plan.n_full, plan.index)
    block_strides = (0, 0, 0) if plan.block_bias is None else tuple(stride_of(plan.block_bias, i) for i in range(3))
    packed = (None, None, None) if box is None else (box.low, box.high, box.coord)
    launch_first = derived(plan, "launch_order", launch_order)
    rest = (dense, every, launch_first, q_order, *packed, plan.row_bits, plan.block_bias, plan.key_bias)
    programs = -(-plan.max_q_len // (2 * ROWS))
    return PlanArguments(
        pointers=(*geometry, *(plan.index if x is None else x for x in rest)),
        strides=(*(s for x in (*geometry, q_order, plan.row_bits) for s in lead(x)), *block_strides, *lead(plan.key_bias)),
        sizes={
            "C": c, "K_WIDTH": plan.index.shape[-1], "PK": plan.kv_positions, "WORDS": (c + 31) // 32, "kv_stride": plan.kv_stride,
            "ROW_ITEMS": plan.n_q_blocks * programs, "ksub": -(-plan.max_kv_len // keys), "QSUB": programs,
            "guard": 0 if box is None else box.guard,
        },
        switches={
            "EVEN": tiled and plan.kv_stride % keys == 0 and plan.kv_positions % plan.kv_stride == 0,
            "UNIFORM": uniform, "TILED": tiled, "HAS_PARTIAL": plan.has_pair_masks, "BOX": box is not None,
            "BITS": plan.row_bits is not None, "BLOCK_BIAS": plan.block_bias is not None, "KEY_BIAS": plan.key_bias is not None,
            "HAS_DENSE": dense is not None, "Q_ORDER": q_order is not None,
        },
    )  # fmt: skip


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
        _launch(q, *keys_in_order(k, v, plan), out, lse, init, plan, scale, keys or hopper_keys(plan))
    return out, lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, init: Any, plan: BlockPlan, scale: float, keys: int
) -> None:  # fmt: skip
    b, h, n, d = q.shape
    dim = 64 if d <= 64 else 128
    facts = derived(plan, f"hopper_{keys}", lambda p: plan_arguments(p, keys))
    key_rows, value_rows = certain_rows(k, keys, dim), certain_rows(v, keys, dim)
    q_tma = d == dim and not facts.switches["Q_ORDER"]
    query_rows = rows_of(q, ROWS, dim) if q_tma else None
    if query_rows is None:  # the descriptor then gives its layout only
        layout = _layout(ROWS, dim, q.dtype)
        aligned = key_rows.table.base
        query_rows, q_tma = Rows(TensorDescriptor(aligned, [ROWS, dim], [dim, 1], [ROWS, dim], layout), 0, 0, 0), False
    init_out, init_lse = init if init is not None else (None, None)
    init_lse = None if init_lse is None else init_lse.contiguous()
    absent = plan.index
    items = facts.sizes["ROW_ITEMS"] * b * h
    layout = (*q.stride(), *out.stride(), *((0, 0, 0, 0) if init_out is None else init_out.stride()))
    named = {
        "scale": scale * LOG2E, "items": items, "H": h, "N": n, **facts.sizes, "GROUP": h // k.shape[1],
        "D": d, "DP": dim, "BN": keys, "ST": RING[dim, keys], "Q_TMA": q_tma, "HAS_INIT": init is not None, "NEED_LSE": lse is not None,
        **facts.switches,
    }  # fmt: skip
    pointers = (q, out, lse, init_out, init_lse)
    alike = specialised(layout, pointers)
    launch(
        block_sparse_hopper,
        (min(items, _processors(q.device.index)), 1, 1),
        [query_rows.table, key_rows.table, value_rows.table, *(absent if x is None else x for x in pointers), *facts.pointers,
         *query_rows[1:], *key_rows[1:], *value_rows[1:], *layout, *facts.strides],
        named,
        {"num_warps": 4, "maxnreg": 168},
        plan.derived,
        None if alike is None else ("hopper", keys, q.dtype, q_tma, d, *alike),
        q.device,
    )  # fmt: skip
