"""Steps of the Hopper kernel: what an item is, where a tile lies, scores with biases and masks, the online softmax, and how an item ends.

Letters as in hopper.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NOTHING = gl.constexpr(-1.2676506002282294e30)  # -2^100: what a mask hides; the reasons stand in portable.py
# Where the peak starts: above all that masks hide, so that hidden keys weigh exactly nothing even in a row that sees no other yet.
# (Were it below, the multiply-add of scale and peak could round to a large positive exponent.) Scores below it count as hidden.
LOWEST = gl.constexpr(-1.0e20)
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
def block_start(c, starts, kv_stride, UNIFORM: gl.constexpr):
    """First position of key block c."""
    if UNIFORM:
        return c * kv_stride
    else:
        return gl.load(starts + c)


@gluon.jit
def keys_left(c, sub, lengths, kv_stride, PK, BN: gl.constexpr, TILED: gl.constexpr):
    """How many keys of key block c lie in its tile ``sub`` or behind it."""
    if TILED:
        size = gl.minimum(kv_stride, PK - c * kv_stride)
    else:
        size = gl.load(lengths + c)
    return size - sub * BN


@gluon.jit
def next_tile(listing, sub, ksub, CUT: gl.constexpr):
    """The entry and the tile in it that follow. CUT: lists are walked from their end, an entry a tile."""
    if CUT:
        return listing - 1, sub
    else:
        turn = sub + 1 == ksub
        return gl.where(turn, listing + 1, listing), gl.where(turn, 0, sub + 1)


@gluon.jit
def send_queries(q_desc, q_s, ring, place, b, h, start, first, turn):
    """The 128 queries of an item, 64 to each consumer."""
    q_full, q_free = ring[6], ring[7]
    q_row_b, q_row_h, q_col_h = place[6], place[7], place[8]
    for who in gl.static_range(2):
        mbarrier.wait(q_free.index(who), (turn & 1) ^ 1)
        mbarrier.expect(q_full.index(who), q_desc.block_type.nbytes)
        row = b * q_row_b + h * q_row_h + start + first + who * ROWS
        tma.async_copy_global_to_shared(q_desc, [row, h * q_col_h], q_full.index(who), q_s.index(who))


@gluon.jit
def this_program(any_integer):
    """``gl.program_id(0)``, read where it is asked for: read ahead of the branch into roles it would not fit the producer's registers."""
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r,r", [any_integer], gl.int32, is_pure=False, pack=1)


@gluon.jit
def item_at(item, work, ksub, CUT: gl.constexpr, HAS_PARTIAL: gl.constexpr, HAS_DENSE: gl.constexpr):
    """-> batch, head, query block, first row inside it, its start and length, where its walk begins, full tiles and masked ones"""
    Rows, r_b, r_h, Index, Every, QSUB, ROW_ITEMS, H = work
    head = item // ROW_ITEMS
    b = head // H
    h = head % H
    row = item % ROW_ITEMS
    facts = Rows + b * r_b + h * r_h + row // QSUB * 8
    first = row % QSUB * (2 * ROWS)
    r = gl.load(facts)
    start = gl.load(facts + 1)
    length = gl.load(facts + 2)
    n_full = gl.load(facts + 3)
    total = n_full
    if HAS_PARTIAL:
        total = gl.load(facts + 4)
    listing = Index + gl.load((facts + 6).to(gl.pointer_type(gl.int64)))
    if HAS_DENSE:
        listing = gl.where(gl.load(facts + 5) != 0, Every, listing)
    if CUT:
        listing += n_full - 1
    live = first < length  # blocks shorter than the longest leave their last items without rows
    # Not full and all: without masks these are one value, and loops that carry one value twice are compiled wrongly (triton 3.6).
    masked = (total - n_full) * ksub
    return b, h, r, first, start, length, listing, gl.where(live, n_full * ksub, 0), gl.where(live, masked, 0)


@gluon.jit
def cell_bounds(Low, High, Dims, PQ, start, first, length, s_lay: gl.constexpr, CELLS: gl.constexpr):
    """Bounds of 64 queries, from a block's origin, for every place of the cells' one-hot vectors. -> int32 [64, CELLS]

    high in the upper half of a word and low in the lower one: registers are short, and coordinates are below 2^14.
    """
    lay: gl.constexpr = gl.DotOperandLayout(0, s_lay, 2)
    local = gl.expand_dims(first + gl.arange(0, ROWS, gl.SliceLayout(1, lay)), 1)
    places = gl.arange(0, CELLS, gl.SliceLayout(0, lay))
    axis = gl.expand_dims(gl.load(Dims + places), 0)
    offset = gl.expand_dims(gl.load(Dims + CELLS + places), 0)
    at = axis * PQ + start + local
    low = gl.load(Low + at, mask=local < length, other=0)
    high = gl.load(High + at, mask=local < length, other=0)
    return ((high - offset) << 16) | ((low - offset) & 0xFFFF)


@gluon.jit
def cell_origin(c, Origin, s_lay: gl.constexpr, CELLS: gl.constexpr):
    """The first key's coordinate on the axis of every place. -> int32 [1, CELLS]"""
    lay: gl.constexpr = gl.DotOperandLayout(0, s_lay, 2)
    return gl.expand_dims(gl.load(Origin + c * CELLS + gl.arange(0, CELLS, gl.SliceLayout(0, lay))), 0)


@gluon.jit
def cell_hidden(origin, bounds):
    """0 where a place lies inside the window, else -2^100. -> bf16 [64, CELLS]"""
    inside = (origin >= ((bounds << 16) >> 16)) & (origin < (bounds >> 16))
    return gl.where(inside, 0.0, NOTHING).to(gl.bfloat16)


@gluon.jit
def scores(
    s, i, lists, sizes, masks, rows, row_ok, scale, s_lay: gl.constexpr, BN: gl.constexpr,
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


@gluon.jit
def wide(stride):
    """A stride in 64 bits, extended by zeros, as none is negative: copies of its sign would fill registers all along the kernel."""
    if isinstance(stride, gl.constexpr):
        return stride
    elif stride.dtype == gl.int32:
        return stride.to(gl.uint32).to(gl.uint64).to(gl.int64)
    else:
        return stride


@gluon.jit
def finish(
    b, h, first, start, length, acc, peak, mass, o_s, work, query, init, output,
    WHO: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, Q_ORDER: gl.constexpr, HAS_INIT: gl.constexpr, NEED_LSE: gl.constexpr,
):  # fmt: skip
    """Merge with what earlier calls left, divide by the mass and store, through shared memory, so that rows leave in pieces of 16 bytes."""
    o_lay: gl.constexpr = acc.type.layout
    o_row: gl.constexpr = gl.SliceLayout(1, o_lay)
    s_row: gl.constexpr = peak.type.layout
    across: gl.constexpr = DP // 8
    io: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    QOrder, qo_b, qo_h = query[5], query[6], query[7]
    Out, Lse, o_b, o_h, o_n, o_d, N = output
    InitOut, InitLse, i_b, i_h, i_n, i_d = init
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    order = QOrder + b64 * qo_b + h64 * qo_h
    line = (b64 * work[7] + h64) * N
    local = first + WHO * ROWS + gl.arange(0, ROWS, s_row)
    dims = gl.arange(0, DP, gl.SliceLayout(0, io))
    local_io = first + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, io))
    if HAS_INIT:
        token = rows_of(order, start, local, local < length, Q_ORDER)
        before = gl.load(InitLse + line + token, mask=(local < length) & (token >= 0), other=-float("inf")) * LOG2E
        top = gl.maximum(peak, before)
        own = gl.exp2(peak - top)
        old_mass = gl.exp2(before - top)
        mass = mass * own + old_mass
        peak = top
        to = rows_of(order, start, local_io, local_io < length, Q_ORDER)
        held = gl.expand_dims((local_io < length) & (to >= 0), 1) & gl.expand_dims(dims < D, 0)
        was = gl.expand_dims(to.to(gl.int64) * wide(i_n), 1) + gl.expand_dims(dims * i_d, 0)
        old = gl.load(InitOut + b64 * wide(i_b) + h64 * wide(i_h) + was, mask=held, other=0.0)
        old = gl.convert_layout(old, o_lay).to(gl.float32)
        seen = gl.expand_dims(gl.convert_layout(old_mass, o_row), 1)
        acc = acc * gl.expand_dims(gl.convert_layout(own, o_row), 1) + gl.where(seen > 0, old * seen, 0.0)
    empty = peak <= LOWEST
    share = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, mass))
    acc = acc * gl.expand_dims(gl.convert_layout(share, o_row), 1)
    staged = o_s.index(WHO)
    meet()  # the last item's rows have left
    staged.store(acc.to(o_s.dtype))
    meet()
    to = rows_of(order, start, local_io, local_io < length, Q_ORDER)
    at = gl.expand_dims(to.to(gl.int64) * wide(o_n), 1) + gl.expand_dims(dims * o_d, 0)
    held = gl.expand_dims((local_io < length) & (to >= 0), 1) & gl.expand_dims(dims < D, 0)
    gl.store(Out + b64 * wide(o_b) + h64 * wide(o_h) + at, staged.load(io), mask=held)
    if NEED_LSE:
        row_ok = local < length
        token = rows_of(order, start, local, row_ok, Q_ORDER)
        lse = gl.where(empty, -float("inf"), peak * LN2 + gl.log(gl.where(empty, 1.0, mass)))
        gl.store(Lse + line + token, lse, mask=row_ok & (token >= 0))
