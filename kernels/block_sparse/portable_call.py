"""Calling the portable kernel: a plan's tensors become pointers and strides, its absent parts compile-time switches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse.launching import empty_outputs, keys_in_order, launch, specialised
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
    b, h, n, d = q.shape
    c = plan.n_kv_blocks
    q_order = None if plan.ordered else plan.q_order
    init_out, init_lse = init if init is not None else (None, None)
    box, proxies = plan.box, plan.proxies
    low, high, coord = (None, None, None) if box is None else (box.low, box.high, box.coord)
    pk, pv, pn, var = (proxies.k, proxies.v, proxies.n, proxies.k_var) if proxies is not None else (None,) * 4
    listed = derived(plan, "listed_words", listed_words) if proxies is not None else None
    dense = derived(plan, "dense_flags", dense_flags) if plan.dense_rows else None
    every = derived(plan, "every_block", every_block) if plan.dense_rows else None
    launch_first = derived(plan, "launch_order", launch_order)
    uniform = plan.kv_stride > 0 and c >= SPECIALISED_BLOCKS
    tiled = uniform and bool(plan.tiled)
    even = tiled and plan.kv_stride % tile.BN == 0 and plan.kv_positions % plan.kv_stride == 0
    ksub = -(-plan.max_kv_len // tile.BN)
    qsub = -(-plan.max_q_len // tile.BM)
    geometry = (plan.q_start, plan.q_len, plan.kv_start, plan.kv_len, plan.count, plan.n_full, plan.index)
    optional = [None if q_order is None else as_order(plan, q_order), plan.row_bits]
    block_strides = (0, 0, 0) if plan.block_bias is None else tuple(stride_of(plan.block_bias, i) for i in range(3))
    init_strides = (0, 0, 0, 0) if init_out is None else init_out.stride()
    layout = (*q.stride(), *k.stride(), *v.stride(), *out.stride(), *init_strides, *_head(pk), *_head(pv), *_head(var))
    pointers = (q, k, v, out, lse, init_out, None if init_lse is None else init_lse.contiguous())
    pooled = (*(None if x is None else _unit(x) for x in (pk, pv)), pn, None if var is None else _unit(var), listed)
    held = (
        dense,
        every,
        launch_first,
        optional[0],
        low,
        high,
        coord,
        plan.row_bits,
        plan.block_bias,
        plan.key_bias,
    )
    alike = specialised(layout, (*pointers, *geometry, *held, *pooled))
    launch(
        block_sparse_forward,
        (plan.n_q_blocks * qsub, b * h, 1),
        [*(_or(x, q) for x in pointers), *geometry, *(_or(x, plan.index) for x in held), *(_or(x, q) for x in pooled), *layout,
         *(s for x in geometry for s in lead(x)), *(s for x in optional for s in lead(x)), *block_strides,
         *lead(plan.key_bias), *lead(pn), *lead(listed)],
        {
            "scale": scale * LOG2E, "H": h, "N": n, "C": c, "K_WIDTH": plan.index.shape[-1], "PQ": plan.q_positions, "PK": plan.kv_positions,
            "WORDS": (c + 31) // 32, "GROUP": h // k.shape[1], "QSUB": qsub, "ksub_any": ksub, "kv_stride": plan.kv_stride,
            "D": d, "DP": padded(d), "BM": tile.BM, "BN": tile.BN, "KSUB": ksub if tiled else 0, "STAGES": tile.stages,
            "EVEN": even, "UNIFORM": uniform, "TILED": tiled, "HAS_PARTIAL": plan.has_pair_masks,
            "AXES": 0 if box is None else box.low.shape[0], "HAS_BITS": plan.row_bits is not None,
            "HAS_BLOCK_BIAS": plan.block_bias is not None, "HAS_KEY_BIAS": plan.key_bias is not None, "HAS_PROXIES": proxies is not None,
            "HAS_VAR": var is not None, "HAS_DENSE": dense is not None, "HAS_Q_ORDER": q_order is not None, "HAS_INIT": init is not None,
            "NEED_LSE": lse is not None, "POSITIVE": scale > 0,
        },
        {"num_warps": tile.warps, "num_stages": tile.stages},
        plan.derived,
        None if alike is None else ("portable", tile, q.dtype, d, scale > 0, *alike),
        q.device,
    )  # fmt: skip


def _or(x: Any, dummy: Tensor) -> Tensor:
    return dummy if x is None else x


def _head(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else tuple(_unit(x).stride()[:3])  # type: ignore[return-value]


def _unit(x: Tensor) -> Tensor:
    """With a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
