"""Steps of the Hopper kernel: what an item is, where a tile lies, scores with biases and masks, and the online softmax.

Letters as in hopper.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NOTHING = gl.constexpr(-1.2676506002282294e30)  # -2^100: what a mask hides; the reasons stand in portable.py
ROWS = gl.constexpr(64)  # query rows of a consumer

if hasattr(gl, "barrier"):

    @gluon.jit
    def meet():
        """All warps of this consumer have come this far."""
        gl.barrier()

else:  # triton 3.6

    @gluon.jit
    def meet():
        """All warps of this consumer have come this far."""
        gl.thread_barrier()


@gluon.jit
def tile_at(i, ksub, listing, starts, lengths, kv_stride, PK, UNIFORM: gl.constexpr, TILED: gl.constexpr):
    """Tile i of a row's walk: its key block, its first key position, and how many of its keys belong to the block."""
    c = gl.load(listing + i // ksub)
    sub = i % ksub
    if UNIFORM:
        first = c * kv_stride
    else:
        first = gl.load(starts + c)
    if TILED:
        size = gl.minimum(kv_stride, PK - first)
    else:
        size = gl.load(lengths + c)
    return c, first, size, sub


@gluon.jit
def item_at(
    item,
    starts,
    lists,
    counts,
    C,
    K_WIDTH,
    QSUB,
    ROW_ITEMS,
    H,
    ksub,
    HAS_PARTIAL: gl.constexpr,
    HAS_DENSE: gl.constexpr,
):
    """-> batch, head, query block, first row inside it, its start and length, its list, full and all tiles of the list"""
    Launch, QStart, QLen, qs_b, qs_h, ql_b, ql_h = starts
    Index, Every, i_b, i_h = lists
    Dense, NFull, Count, f_b, f_h, c_b, c_h = counts
    head = item // ROW_ITEMS
    row = item % ROW_ITEMS
    b = head // H
    h = head % H
    r = gl.load(Launch + row // QSUB)
    first = (row % QSUB) * (2 * ROWS)
    start = gl.load(QStart + b * qs_b + h * qs_h + r)
    length = gl.load(QLen + b * ql_b + h * ql_h + r)
    listing = Index + b.to(gl.int64) * i_b + h.to(gl.int64) * i_h + r.to(gl.int64) * K_WIDTH
    n_full = gl.load(NFull + b * f_b + h * f_h + r)
    total = n_full
    if HAS_PARTIAL:
        total = gl.load(Count + b * c_b + h * c_h + r)
    if HAS_DENSE:
        dense = gl.load(Dense + r) != 0
        n_full = gl.where(dense, C, n_full)
        total = gl.where(dense, C, total)
        listing = gl.where(dense, Every, listing)
    live = first < length  # blocks shorter than the longest leave their last items without rows
    return b, h, r, first, start, length, listing, gl.where(live, n_full * ksub, 0), gl.where(live, total * ksub, 0)


@gluon.jit
def scores(
    s, i, n_full, lists, sizes, masks, rows, row_ok, scale, s_lay: gl.constexpr, BN: gl.constexpr,
    UNIFORM: gl.constexpr, TILED: gl.constexpr, EVEN: gl.constexpr, PARTIAL: gl.constexpr, BOX: gl.constexpr,
    BITS: gl.constexpr, BLOCK_BIAS: gl.constexpr, KEY_BIAS: gl.constexpr,
):  # fmt: skip
    """Scaled, biased and masked scores of tile i. PARTIAL: entries that need a pair mask. -> [64, BN] log2 units"""
    listing, starts, lengths = lists
    ksub, kv_stride, PK, GROUP = sizes
    low, high, coord, guard, bits, words, block_bias, key_bias = masks
    col: gl.constexpr = gl.SliceLayout(0, s_lay)
    s = s * scale
    if not EVEN or PARTIAL or BLOCK_BIAS or KEY_BIAS:
        c, first, size, sub = tile_at(i, ksub, listing, starts, lengths, kv_stride, PK, UNIFORM, TILED)
        left = size - sub * BN
        keys = gl.arange(0, BN, col)
        at = first + sub * BN + keys
        if BLOCK_BIAS:
            s += gl.load(block_bias + c) * LOG2E
        if KEY_BIAS:
            s += gl.expand_dims(gl.load(key_bias + at, mask=keys < left, other=0.0) * LOG2E, 0)
        if BLOCK_BIAS or KEY_BIAS:
            s = gl.maximum(s, NOTHING)
        if PARTIAL:
            if BOX:
                lows = gl.load(low + rows, mask=row_ok, other=0)
                highs = gl.load(high + rows, mask=row_ok, other=0)
                where = gl.load(coord + at, mask=keys < left, other=guard)  # guard lies above every bound
                inside = (gl.expand_dims(where, 0) - gl.expand_dims(lows, 1)) & (
                    gl.expand_dims(highs, 1) - gl.expand_dims(where, 0)
                )
                s = gl.where((inside & guard) == guard, s, NOTHING)
            elif left < BN:
                s = gl.where(gl.expand_dims(keys < left, 0), s, NOTHING)
            if BITS:
                word = gl.load(bits + rows.to(gl.int64) * words + c // 32, mask=row_ok, other=0)
                s = gl.where(gl.expand_dims(((word >> (c % 32)) & 1) != 0, 1), s, NOTHING)
        elif not EVEN:
            if left < BN:
                s = gl.where(gl.expand_dims(keys < left, 0), s, NOTHING)
    return s


@gluon.jit
def absorb(s, peak, mass):
    """One online-softmax step. -> probabilities, new peak, new mass, factor on what was gathered before"""
    new = gl.maximum(peak, gl.max(s, 1))
    p = gl.exp2(s - gl.expand_dims(new, 1))
    keep = gl.exp2(peak - new)
    return p, new, mass * keep + gl.sum(p, 1), keep


@gluon.jit
def absorb_plain(s, peak, mass, scale):
    """The same for unscaled scores; the scale rides on the exponent's multiply-add."""
    new = gl.maximum(peak, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(new, 1))
    keep = gl.exp2(peak - new)
    return p, new, mass * keep + gl.sum(p, 1), keep


@gluon.jit
def rows_of(order, start, local, in_block, Q_ORDER: gl.constexpr):
    """The caller's rows of this consumer, -1 for padding."""
    if Q_ORDER:
        return gl.load(order + start + local, mask=in_block, other=-1)
    else:
        return start + local
