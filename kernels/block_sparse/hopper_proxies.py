"""Proxies in the Hopper kernel: pooled keys and values that stand for the blocks a row does not list, behind the tiles of its list.

Letters as in hopper.py; C key blocks, which are C rows of up to three more tables: pooled keys, pooled values, variances of keys.

* The producer sends them in tiles of BN through the same ring, after an item's listed tiles, so both consumers share one copy. Every item
  with rows sends all C of them; a bias of -inf hides what the row lists.
* With variances a tile takes two turns of the ring: pooled keys and values first, then the variances in the keys' place, with no values.
  Their product with the queries' squares is added to the same scores.
* They are few beside the listed keys (one for a block of 128), so their tiles run one after the other, and only the other consumer overlaps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.kernels.block_sparse.hopper_steps import LN2, LOG2E, NOTHING, ROWS, absorb, meet, wide


@gluon.jit
def wide_strides(masks, query, output, work):
    """Strides of masks, queries and lines in 64 bits (see ``wide``): with proxies, there is no room for copies of their signs."""
    Low, High, Coord, guard, Bits, words, rb_b, rb_h, BlockBias, bb_b, bb_h, bb_r, KeyBias, kb_b, kb_h = masks
    Q, q_b, q_h, q_n, q_d, QOrder, qo_b, qo_h = query
    Out, Lse, o_b, o_h, o_n, o_d, N = output
    Rows, r_b, r_h, Index, Every, QSUB, ROW_ITEMS, H = work
    masks = (
        Low, High, Coord, guard, Bits, words, wide(rb_b), wide(rb_h), BlockBias, wide(bb_b), wide(bb_h), wide(bb_r), KeyBias, wide(kb_b), wide(kb_h),
    )  # fmt: skip
    query = (Q, wide(q_b), wide(q_h), wide(q_n), q_d, QOrder, wide(qo_b), wide(qo_h))
    output = (Out, Lse, o_b, o_h, o_n, o_d, wide(N))
    return masks, query, output, (Rows, r_b, r_h, Index, Every, QSUB, ROW_ITEMS, wide(H))


@gluon.jit
def needs_queries(total, first, length, PROXIES: gl.constexpr):
    """Whether an item has tiles at all: proxies stand in where nothing is listed."""
    if PROXIES:
        return first < length
    else:
        return total > 0


@gluon.jit
def proxy_tiles(proxies, first, length):
    """Tiles of proxies of an item: none where it has no rows."""
    return gl.where(first < length, proxies[0], 0)


@gluon.jit
def send(desc, row, col, full, free, to, slot, phase):
    """One tile of a table into a slot of the ring, once the slot is free."""
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, col], full.index(slot), to.index(slot))


@gluon.jit
def send_proxies(
    pk_desc, pv_desc, var_desc, ring, place, done, tiles, b, hk, ST: gl.constexpr, BN: gl.constexpr, VAR: gl.constexpr
):
    """The producer's part of an item: ``tiles`` tiles of proxies, from turn ``done`` of the ring on."""
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    pk_row_b, pk_row_h, pk_col_h, pv_row_b, pv_row_h, pv_col_h, var_row_b, var_row_h, var_col_h = place
    for i in range(tiles):
        turn = done + i * (2 if VAR else 1)
        slot = turn % ST
        phase = (turn // ST) & 1
        send(pk_desc, b * pk_row_b + hk * pk_row_h + i * BN, hk * pk_col_h, k_full, k_free, k_s, slot, phase)
        send(pv_desc, b * pv_row_b + hk * pv_row_h + i * BN, hk * pv_col_h, v_full, v_free, v_s, slot, phase)
        if VAR:
            slot = (turn + 1) % ST
            phase = ((turn + 1) // ST) & 1
            send(var_desc, b * var_row_b + hk * var_row_h + i * BN, hk * var_col_h, k_full, k_free, k_s, slot, phase)
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            mbarrier.arrive(v_full.index(slot), count=1)  # no values go with variances


@gluon.jit
def log_sizes(n_at, listed, block_bias, first, C, BN: gl.constexpr, BLOCK_BIAS: gl.constexpr):
    """What is added to the scores of proxies first .. first + BN, log2 units; -inf where there is none to see. -> [BN], a thread each"""
    block = first + gl.arange(0, BN, gl.BlockedLayout([1], [32], [4], [0]))
    inside = block < C
    n = gl.load(n_at + block, mask=inside, other=0.0)
    add = gl.log2(gl.maximum(n, 1.0e-30))
    if BLOCK_BIAS:
        add += gl.load(block_bias + block, mask=inside, other=0.0) * LOG2E
    word = gl.load(listed + block // 32, mask=inside, other=-1)
    return gl.where((n > 0) & (((word >> (block % 32)) & 1) == 0), add, -float("inf"))


@gluon.jit
def attend_proxies(
    acc, peak, mass, b, h, r, tiles, done, q, ring, proxies, masks, scale,
    ST: gl.constexpr, BN: gl.constexpr, BLOCK_BIAS: gl.constexpr, VAR: gl.constexpr,
):  # fmt: skip
    """A consumer's part: its 64 rows over ``tiles`` tiles of proxies. Rows that are none take part and are never stored. -> acc, peak, mass"""
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_lay: gl.constexpr = acc.type.layout
    p_lay: gl.constexpr = gl.DotOperandLayout(0, o_lay, 2)
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    pooled, C, ProxyN, pn_b, pn_h, Listed, li_b, li_h = proxies
    BlockBias, bb_b, bb_h, bb_r = masks[8], masks[9], masks[10], masks[11]
    n_at = ProxyN + (b * pn_b + h * pn_h)
    listed = Listed + (b * li_b + h * li_h + r * masks[5])  # a plan of more words would not fit the memory
    block_bias = BlockBias + b.to(gl.int64) * bb_b + h.to(gl.int64) * bb_h + r.to(gl.int64) * bb_r
    ahead = log_sizes(n_at, listed, block_bias, 0, C, BN, BLOCK_BIAS)
    for i in range(tiles):
        turn = done + i * (2 if VAR else 1)
        slot = turn % ST
        phase = (turn // ST) & 1
        add = gl.convert_layout(ahead, gl.SliceLayout(0, s_lay))
        ahead = log_sizes(n_at, listed, block_bias, (i + 1) * BN, C, BN, BLOCK_BIAS)
        none = gl.zeros([ROWS, BN], gl.float32, s_lay)
        mbarrier.wait(k_full.index(slot), phase)
        flying = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(flying,))
        meet()
        mbarrier.arrive(k_free.index(slot), count=1)
        if VAR:
            more = (turn + 1) % ST
            mbarrier.wait(k_full.index(more), ((turn + 1) // ST) & 1)
            x = q.load(gl.DotOperandLayout(0, s_lay, 2)).to(gl.float32)
            square = (x * x * (0.5 * LN2 * scale)).to(q.dtype)  # as they weigh before scores are scaled
            flying = warpgroup_mma(square, k_s.index(more).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=(flying,))
            mbarrier.wait(v_full.index(more), ((turn + 1) // ST) & 1)
            meet()
            mbarrier.arrive(k_free.index(more), count=1)
            mbarrier.arrive(v_free.index(more), count=1)
        p, peak, mass, keep = absorb(gl.maximum(s * scale + gl.expand_dims(add, 0), NOTHING), peak, mass)
        acc = acc * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, o_lay)), 1)
        mbarrier.wait(v_full.index(slot), phase)
        gathering = warpgroup_mma(gl.convert_layout(p.to(k_s.dtype), p_lay), v_s.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(gathering,))
        meet()
        mbarrier.arrive(v_free.index(slot), count=1)
    return acc, peak, mass
