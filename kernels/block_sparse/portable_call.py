"""Calling the portable kernel: a plan's tensors become pointers and strides, its absent parts compile-time switches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse import counting
from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.block_sparse.portable import block_sparse_forward
from foveal.kernels.block_sparse.tiles import SHARED_EVERYWHERE, Tile, padded, tile_for
from foveal.kernels.order import permute_tokens

LOG2E = 1.4426950408889634
SPECIALISED_BLOCKS = 16  # fewer key blocks than this are not worth compiling a variant of their own


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
    b, h, n, d = q.shape
    tile = tile or tile_for(*_chip(q), q.element_size(), d)
    if not plan.ordered and plan.kv_order is not None:
        k, v = permute_tokens(k, plan.kv_order), permute_tokens(v, plan.kv_order)
    out = torch.empty_like(q) if plan.covers else torch.zeros_like(q)
    lse = torch.full((b, h, n), -torch.inf, device=q.device) if need_lse else None
    if not plan.n_q_blocks or not plan.max_q_len:
        return out.zero_(), lse
    _launch(q, k, v, out, lse, init, plan, scale, tile)
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
    c, dummy = plan.n_kv_blocks, q
    q_order = None if plan.ordered else plan.q_order
    init_out, init_lse = init if init is not None else (None, None)
    box, proxies = plan.box, plan.proxies
    pk, pv, pn, var = (proxies.k, proxies.v, proxies.n, proxies.k_var) if proxies is not None else (None,) * 4
    listed = _derived(plan, "listed_words", _listed_words) if proxies is not None else None
    dense = _derived(plan, "dense_flags", _dense_flags) if plan.dense_rows else None
    every = _derived(plan, "every_block", _every_block) if plan.dense_rows else None
    launch = _derived(plan, "launch_order", _launch_order)
    uniform = plan.kv_stride > 0 and c >= SPECIALISED_BLOCKS
    tiled = uniform and bool(plan.tiled)
    even = tiled and plan.kv_stride % tile.BN == 0 and plan.kv_positions % plan.kv_stride == 0
    ksub = -(-plan.max_kv_len // tile.BN)
    qsub = -(-plan.max_q_len // tile.BM)
    geometry = (plan.q_start, plan.q_len, plan.kv_start, plan.kv_len, plan.count, plan.n_full, plan.index)
    optional = [None if q_order is None else _order(plan, q_order), plan.row_bits]
    block_strides = (0, 0, 0) if plan.block_bias is None else tuple(_stride(plan.block_bias, i) for i in range(3))
    init_strides = (0, 0, 0, 0) if init_out is None else init_out.stride()
    block_sparse_forward[(plan.n_q_blocks * qsub, b * h)](
        q, k, v, out, _or(lse, dummy), _or(init_out, dummy), _or(None if init_lse is None else init_lse.contiguous(), dummy),
        *geometry, _or(dense, dummy), _or(every, plan.index), launch, _or(optional[0], dummy),
        _or(box and box.low, dummy), _or(box and box.high, dummy), _or(box and box.coord, dummy),
        _or(plan.row_bits, dummy), _or(plan.block_bias, dummy), _or(plan.key_bias, dummy),
        *(_or(None if x is None else _unit(x), dummy) for x in (pk, pv)), _or(pn, dummy), _or(None if var is None else _unit(var), dummy), _or(listed, dummy),
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *init_strides, *_head(pk), *_head(pv), *_head(var),
        *(s for x in geometry for s in _lead(x)), *(s for x in optional for s in _lead(x)), *block_strides, *_lead(plan.key_bias), *_lead(pn), *_lead(listed),
        scale * LOG2E, h, n, c, plan.index.shape[-1], plan.q_positions, plan.kv_positions, (c + 31) // 32, h // k.shape[1], qsub, ksub, plan.kv_stride,
        D=d, DP=padded(d), BM=tile.BM, BN=tile.BN, KSUB=ksub if tiled else 0, STAGES=tile.stages,
        EVEN=even, UNIFORM=uniform, TILED=tiled, HAS_PARTIAL=plan.has_pair_masks, AXES=0 if box is None else box.low.shape[0],
        HAS_BITS=plan.row_bits is not None, HAS_BLOCK_BIAS=plan.block_bias is not None, HAS_KEY_BIAS=plan.key_bias is not None,
        HAS_PROXIES=proxies is not None, HAS_VAR=var is not None, HAS_DENSE=dense is not None, HAS_Q_ORDER=q_order is not None,
        HAS_INIT=init is not None, NEED_LSE=lse is not None, POSITIVE=scale > 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _or(x: Any, dummy: Tensor) -> Tensor:
    return dummy if x is None else x


def _stride(x: Tensor, dim: int) -> int:
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _lead(x: Tensor | None) -> tuple[int, int]:
    """Strides over batch and heads, 0 where shared."""
    return (0, 0) if x is None else (_stride(x, 0), _stride(x, 1))


def _head(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else tuple(_unit(x).stride()[:3])  # type: ignore[return-value]


def _unit(x: Tensor) -> Tensor:
    """With a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _derived(plan: BlockPlan, name: str, make: Any) -> Tensor:
    if name not in plan.derived:
        plan.derived[name] = make(plan)
    return plan.derived[name]


def _dense_flags(plan: BlockPlan) -> Tensor:
    return counting.dense_row_mask(plan).to(torch.int32)


def _every_block(plan: BlockPlan) -> Tensor:
    """The list of dense rows. -> int32 [C]"""
    return torch.arange(plan.n_kv_blocks, dtype=torch.int32, device=plan.device)


def _launch_order(plan: BlockPlan) -> Tensor:
    """Query blocks, longest list first. -> int32 [R]"""
    cost = plan.count.amax((0, 1)) + counting.dense_row_mask(plan) * plan.n_kv_blocks
    return torch.argsort(cost, dim=0, descending=True, stable=True).to(torch.int32)


def _listed_words(plan: BlockPlan) -> Tensor:
    """Bit c of word c // 32 is set where block c is listed. -> int32 [Bm, Hm, R, ceil(C / 32)]"""
    bits = counting.visits(plan)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    weights = (1 << torch.arange(32, device=bits.device)).to(torch.int64)
    return (bits * weights).sum(-1).to(torch.int32)


def _order(plan: BlockPlan, order: Tensor) -> Tensor:
    """-> int32 [1 or B, 1 or H, P], contiguous"""

    def make(_: BlockPlan) -> Tensor:
        return order.to(torch.int32).reshape(*([1] * (3 - order.ndim)), *order.shape).contiguous()

    return _derived(plan, "q_order", make)
