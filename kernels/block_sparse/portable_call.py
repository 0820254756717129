"""Calling the portable kernel: a plan's tensors become pointers and strides, its absent parts compile-time switches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse.launching import PlanArguments, Started, empty_outputs, keys_in_order, launch
from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.block_sparse.plan_forms import (
    as_order,
    dense_flags,
    derived,
    every_block,
    launch_order,
    lead,
    listed_words,
    stride_of,
)
from foveal.kernels.block_sparse.portable import block_sparse_forward
from foveal.kernels.block_sparse.tiles import SHARED_EVERYWHERE, SPECIALISED_BLOCKS, Tile, padded, tile_for

LOG2E = 1.4426950408889634


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    need_lse: bool,
    init: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in ``block_sparse_attention``; ``tile`` overrides the tuned tile sizes (for tuning and tests)."""
    out, lse = empty_outputs(q, plan, need_lse)
    if plan.n_q_blocks and plan.max_q_len:
        tile = tile or tile_for(*_chip(q), q.element_size(), q.shape[-1])
        _launch(q, *keys_in_order(k, v, plan), out, lse, init, plan, scale, tile)
    return out, lse


def _chip(q: Tensor) -> tuple[int, int]:
    """(capability, bytes of shared memory one program may use)."""
    if not q.is_cuda:
        return 80, SHARED_EVERYWHERE  # the interpreter
    return _chip_of(q.device.index)


@functools.lru_cache(maxsize=16)
def _chip_of(device: int) -> tuple[int, int]:
    facts = torch.cuda.get_device_properties(device)
    return 10 * facts.major + facts.minor, facts.shared_memory_per_block_optin  # type: ignore[attr-defined]


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    init: Any,
    plan: BlockPlan,
    scale: float,
    tile: Tile,
) -> None:
    init_out, init_lse = (None, None) if init is None else (init[0], init[1].contiguous())
    pointers = [q if x is None else x for x in (q, k, v, out, lse, init_out, init_lse)]
    addresses = [x.data_ptr() for x in pointers]
    layout = (q.stride(), k.stride(), v.stride(), out.stride(), (0, 0, 0, 0) if init_out is None else init_out.stride())
    aligned = [x % 16 == 0 for x in addresses]
    before = None if init_out is None or init_lse is None else (init_out.dtype, init_lse.dtype)
    kind = (tile, scale, q.dtype, q.shape, k.shape, lse is None, before, *layout, *aligned)
    calls: dict[Any, Started] = derived(plan, "portable_calls", lambda _: {})
    seen = calls.get(kind)
    if seen is not None:
        return seen.again(*addresses)
    facts = derived(plan, f"portable_{tile.BM}_{tile.BN}", lambda p: plan_arguments(p, tile))
    b, h, n, d = q.shape
    started = launch(
        block_sparse_forward,
        (plan.n_q_blocks * facts.sizes["QSUB"], b * h, 1),
        pointers,
        [*facts.pointers, *(x for strides in layout for x in strides), *facts.strides],
        {
            "scale": scale * LOG2E, "H": h, "N": n, **facts.sizes, "GROUP": h // k.shape[1], "D": d, "DP": padded(d), "BM": tile.BM,
            "BN": tile.BN, "STAGES": tile.stages, **facts.switches, "HAS_INIT": init is not None, "NEED_LSE": lse is not None,
            "POSITIVE": scale > 0,
        },
        {"num_warps": tile.warps, "num_stages": tile.stages},
        q.device,
    )  # fmt: skip
    if started is not None:
        calls[kind] = started


def plan_arguments(plan: BlockPlan, tile: Tile) -> PlanArguments:
    box, proxies = plan.box, plan.proxies
    q_order = None if plan.ordered or plan.q_order is None else as_order(plan, plan.q_order)
    low, high, coord = (None, None, None) if box is None else (box.low, box.high, box.coord)
    pk, pv, pn, var = (None,) * 4 if proxies is None else (proxies.k, proxies.v, proxies.n, proxies.k_var)
    pk, pv, var = (None if x is None else _unit(x) for x in (pk, pv, var))
    listed = derived(plan, "listed_words", listed_words) if proxies is not None else None
    dense = derived(plan, "dense_flags", dense_flags) if plan.dense_rows else None
    every = derived(plan, "every_block", every_block) if plan.dense_rows else None
    launch_first = derived(plan, "launch_order", launch_order)
    c = plan.n_kv_blocks
    uniform = plan.kv_stride > 0 and c >= SPECIALISED_BLOCKS
    tiled = uniform and bool(plan.tiled)
    ksub = -(-plan.max_kv_len // tile.BN)
    geometry = (plan.q_start, plan.q_len, plan.kv_start, plan.kv_len, plan.count, plan.n_full, plan.index)
    rest = (
        dense, every, launch_first, q_order, low, high, coord, plan.row_bits, plan.block_bias, plan.key_bias, pk, pv, pn, var, listed,
    )  # fmt: skip
    bias_strides = (0, 0, 0) if plan.block_bias is None else tuple(stride_of(plan.block_bias, i) for i in range(3))
    led = (*geometry, q_order, plan.row_bits)
    return PlanArguments(
        pointers=(*geometry, *(plan.index if x is None else x for x in rest)),
        strides=(
            *_head(pk), *_head(pv), *_head(var), *(s for x in led for s in lead(x)), *bias_strides,
            *(s for x in (plan.key_bias, pn, listed, launch_first) for s in lead(x)),
        ),
        sizes={
            "C": c, "K_WIDTH": plan.index.shape[-1], "PQ": plan.q_positions, "PK": plan.kv_positions, "WORDS": (c + 31) // 32,
            "QSUB": -(-plan.max_q_len // tile.BM), "ksub_any": ksub, "kv_stride": plan.kv_stride,
        },
        switches={
            "KSUB": ksub if tiled else 0, "UNIFORM": uniform, "TILED": tiled, "HAS_PARTIAL": plan.has_pair_masks,
            "EVEN": tiled and plan.kv_stride % tile.BN == 0 and plan.kv_positions % plan.kv_stride == 0,
            "AXES": 0 if box is None else box.low.shape[0], "HAS_BITS": plan.row_bits is not None,
            "HAS_BLOCK_BIAS": plan.block_bias is not None, "HAS_KEY_BIAS": plan.key_bias is not None, "HAS_PROXIES": proxies is not None,
            "HAS_VAR": var is not None, "HAS_DENSE": dense is not None, "HAS_Q_ORDER": q_order is not None,
        },
    )  # fmt: skip


def _head(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else tuple(x.stride()[:3])  # type: ignore[return-value]


def _unit(x: Tensor) -> Tensor:
    """With a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
