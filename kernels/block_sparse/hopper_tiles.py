"""One tile in a consumer of the Hopper kernel: Q K^T and softmax of this tile beside P V of the tile before.

Letters as in hopper.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from foveal.kernels.block_sparse.hopper_steps import (
    NOTHING,
    ROWS,
    absorb,
    absorb_plain,
    meet,
    scores,
)


@gluon.jit
def step(
    acc, weights, peak, mass, left, hidden, mine, ring, hot_s, tile, scale, s_lay: gl.constexpr, ST: gl.constexpr, BN: gl.constexpr,
    SHORT: gl.constexpr, CELLS: gl.constexpr,
):  # fmt: skip
    """Tile ``tile`` of the ring: its Q K^T and softmax beside P V of the tile before.

    SHORT: only ``left`` of its keys count. CELLS: ``hidden`` [64, CELLS] times the cells' one-hot factor is the mask.
    """
    o_lay: gl.constexpr = acc.type.layout
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    slot = tile % ST
    last = (tile - 1) % ST
    none = gl.zeros([ROWS, BN], gl.float32, s_lay)
    mbarrier.wait(k_full.index(slot), (tile // ST) & 1)
    flying = warpgroup_mma(mine, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    if CELLS:
        flying = warpgroup_mma(hidden, hot_s.permute((1, 0)), flying, is_async=True)
    mbarrier.wait(v_full.index(last), ((tile - 1) // ST) & 1)
    gathering = warpgroup_mma(weights, v_s.index(last), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(flying,))
    meet()
    mbarrier.arrive(k_free.index(slot), count=1)
    if SHORT:
        s = gl.where(gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, s_lay)) < left, 0), s, NOTHING)
    p, peak, mass, keep = absorb_plain(s, peak, mass, scale)
    p = gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(0, o_lay, 2))
    acc = warpgroup_mma_wait(0, deps=(gathering,))
    meet()
    mbarrier.arrive(v_free.index(last), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, o_lay)), 1)
    return acc, p, peak, mass


@gluon.jit
def careful_step(
    acc, weights, peak, mass, i, done, mine, ring, lists, sizes, hides, rows, row_ok, scale, s_lay: gl.constexpr,
    ST: gl.constexpr, BN: gl.constexpr, UNIFORM: gl.constexpr, TILED: gl.constexpr, EVEN: gl.constexpr, PARTIAL: gl.constexpr,
    BOX: gl.constexpr, BITS: gl.constexpr, BLOCK_BIAS: gl.constexpr, KEY_BIAS: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """The same for tile i of a list with biases and masks. They need registers: unless BESIDE, P V is waited for first, and only the
    other consumer overlaps."""
    o_lay: gl.constexpr = acc.type.layout
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    slot = (done + i) % ST
    last = (done + i - 1) % ST
    none = gl.zeros([ROWS, BN], gl.float32, s_lay)
    mbarrier.wait(k_full.index(slot), ((done + i) // ST) & 1)
    flying = warpgroup_mma(mine, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), ((done + i - 1) // ST) & 1)
    gathering = warpgroup_mma(weights, v_s.index(last), acc, is_async=True)
    if BESIDE:
        s = warpgroup_mma_wait(1, deps=(flying,))
    else:
        s, acc = warpgroup_mma_wait(0, deps=(flying, gathering))
    meet()
    mbarrier.arrive(k_free.index(slot), count=1)
    if not BESIDE:
        mbarrier.arrive(v_free.index(last), count=1)
    s = scores(
        s,
        i,
        lists,
        sizes,
        hides,
        rows,
        row_ok,
        scale,
        s_lay,
        BN,
        UNIFORM,
        TILED,
        EVEN,
        PARTIAL,
        BOX,
        BITS,
        BLOCK_BIAS,
        KEY_BIAS,
    )
    p, peak, mass, keep = absorb(s, peak, mass)
    weights = gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(0, o_lay, 2))
    if BESIDE:
        acc = warpgroup_mma_wait(0, deps=(gathering,))
        meet()
        mbarrier.arrive(v_free.index(last), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, o_lay)), 1)
    return acc, weights, peak, mass
