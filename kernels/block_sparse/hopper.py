"""The Hopper kernel: warp-specialised block-sparse attention in Gluon, which ships inside triton.

Letters as in plan.py; D head dim, DP head dim padded to 64 or 128, BN keys of a tile, ksub tiles of the longest key block, QSUB items
of the longest query block, ST tiles in the ring. An item is 128 query rows of one head: two consumer warpgroups of 64 rows and one producer
warp walk its list together.

* One program stays on each multiprocessor and takes every n-th item, longest list first: while consumers finish an item, the producer
  is already loading the next one.
* The producer reads the lists and starts the copies of keys and values (TMA) into a ring of ST tiles; consumers never wait for an address.
* Step i of a consumer issues Q K^T of tile i, then P V of tile i - 1, and works on the exponentials of tile i while P V runs.
* Queries and outputs go through pointers, so the caller's order, ragged blocks and any strides cost nothing extra. Keys come by TMA from any
  row: a tile may run past its block, and what lies beyond is hidden by the mask, never skipped. So keys and values must be finite there.
* Box masks are packed: a query's bounds and a key's coordinates lie in one 32-bit word each, one field per axis with a guard bit, and one
  subtraction tests all axes (see ``pack_box``).
* Scores are kept in log2 units.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.kernels.block_sparse.hopper_steps import (
    LN2,
    LOG2E,
    NOTHING,
    ROWS,
    absorb,
    absorb_plain,
    item_at,
    meet,
    rows_of,
    scores,
    tile_at,
)


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, q_s, ring, items, work, blocks, sizes, place,
    ST: gl.constexpr, BN: gl.constexpr, UNIFORM: gl.constexpr, TILED: gl.constexpr, HAS_PARTIAL: gl.constexpr,
    HAS_DENSE: gl.constexpr, Q_TMA: gl.constexpr,
):  # fmt: skip
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    starts, lists, counts, C, K_WIDTH, QSUB, ROW_ITEMS, H = work
    KvStart, KvLen, ks_b, ks_h, kl_b, kl_h = blocks
    ksub, kv_stride, PK, GROUP = sizes
    k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h, q_row_b, q_row_h, q_col_h = place
    done = 0  # tiles so far
    turn = 0  # items so far
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, r, first, start, length, listing, n_full, total = item_at(
            item, starts, lists, counts, C, K_WIDTH, QSUB, ROW_ITEMS, H, ksub, HAS_PARTIAL, HAS_DENSE
        )
        hk = h // GROUP
        if Q_TMA:
            for who in gl.static_range(2):
                mbarrier.wait(q_free.index(who), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(who), q_desc.block_type.nbytes)
                at = b * q_row_b + h * q_row_h + start + first + who * ROWS
                tma.async_copy_global_to_shared(q_desc, [at, h * q_col_h], q_full.index(who), q_s.index(who))
        key_starts, key_lengths = KvStart + b * ks_b + h * ks_h, KvLen + b * kl_b + h * kl_h
        k_row, k_col = b * k_row_b + hk * k_row_h, hk * k_col_h
        v_row, v_col = b * v_row_b + hk * v_row_h, hk * v_col_h
        for i in range(total):
            slot = (done + i) % ST
            phase = ((done + i) // ST) & 1
            c, at, size, sub = tile_at(i, ksub, listing, key_starts, key_lengths, kv_stride, PK, UNIFORM, TILED)
            at = at + sub * BN
            mbarrier.wait(k_free.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [k_row + at, k_col], k_full.index(slot), k_s.index(slot))
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [v_row + at, v_col], v_full.index(slot), v_s.index(slot))
        done += total
        turn += 1


@gluon.jit
def consumer(
    q_s, o_s, ring, items, work, blocks, sizes, masks, query, init, output, scale,
    WHO: gl.constexpr, ST: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, UNIFORM: gl.constexpr,
    TILED: gl.constexpr, EVEN: gl.constexpr, HAS_PARTIAL: gl.constexpr, BOX: gl.constexpr, BITS: gl.constexpr,
    BLOCK_BIAS: gl.constexpr, KEY_BIAS: gl.constexpr, HAS_DENSE: gl.constexpr, Q_ORDER: gl.constexpr, Q_TMA: gl.constexpr,
    HAS_INIT: gl.constexpr, NEED_LSE: gl.constexpr,
):  # fmt: skip
    starts, lists, counts, C, K_WIDTH, QSUB, ROW_ITEMS, H = work
    ksub, kv_stride, PK, GROUP = sizes
    done = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, r, first, start, length, listing, n_full, total = item_at(
            item, starts, lists, counts, C, K_WIDTH, QSUB, ROW_ITEMS, H, ksub, HAS_PARTIAL, HAS_DENSE
        )
        walk(
            b, h, r, first, start, length, listing, n_full, total, done, turn,
            q_s, o_s, ring, blocks, sizes, masks, query, init, output, scale, H,
            WHO, ST, D, DP, BN, UNIFORM, TILED, EVEN, HAS_PARTIAL, BOX, BITS, BLOCK_BIAS, KEY_BIAS, Q_ORDER, Q_TMA, HAS_INIT, NEED_LSE,
        )  # fmt: skip
        done += total
        turn += 1


@gluon.jit
def walk(
    b, h, r, first, start, length, listing, n_full, total, done, turn,
    q_s, o_s, ring, blocks, sizes, masks, query, init, output, scale, H,
    WHO: gl.constexpr, ST: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, UNIFORM: gl.constexpr,
    TILED: gl.constexpr, EVEN: gl.constexpr, HAS_PARTIAL: gl.constexpr, BOX: gl.constexpr, BITS: gl.constexpr,
    BLOCK_BIAS: gl.constexpr, KEY_BIAS: gl.constexpr, Q_ORDER: gl.constexpr, Q_TMA: gl.constexpr, HAS_INIT: gl.constexpr,
    NEED_LSE: gl.constexpr,
):  # fmt: skip
    """One item: 64 query rows over the tiles of their list."""
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DP, 16])
    p_lay: gl.constexpr = gl.DotOperandLayout(0, o_lay, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_lay)
    o_row: gl.constexpr = gl.SliceLayout(1, o_lay)
    across: gl.constexpr = DP // 8
    io: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    PLAIN: gl.constexpr = EVEN and not BLOCK_BIAS and not KEY_BIAS
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    KvStart, KvLen, ks_b, ks_h, kl_b, kl_h = blocks
    Q, q_b, q_h, q_n, q_d, QOrder, qo_b, qo_h = query
    InitOut, InitLse, i_b, i_h, i_n, i_d = init
    Out, Lse, o_b, o_h, o_n, o_d, N = output
    Low, High, Coord, guard, Bits, words, rb_b, rb_h, BlockBias, bb_b, bb_h, bb_r, KeyBias, kb_b, kb_h = masks
    dtype: gl.constexpr = k_s.dtype
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    lists = (listing, KvStart + b * ks_b + h * ks_h, KvLen + b * kl_b + h * kl_h)
    hides = (
        Low, High, Coord, guard, Bits + b64 * rb_b + h64 * rb_h, words,
        BlockBias + b64 * bb_b + h64 * bb_h + r.to(gl.int64) * bb_r, KeyBias + b64 * kb_b + h64 * kb_h,
    )  # fmt: skip
    order = QOrder + b64 * qo_b + h64 * qo_h
    line = (b64 * H + h64) * N
    mine = q_s.index(WHO)
    dims = gl.arange(0, DP, gl.SliceLayout(0, io))
    local_io = first + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, io))
    to = rows_of(order, start, local_io, local_io < length, Q_ORDER)
    held = gl.expand_dims((local_io < length) & (to >= 0), 1) & gl.expand_dims(dims < D, 0)
    at = gl.expand_dims(to.to(gl.int64) * q_n, 1) + gl.expand_dims(dims * q_d, 0)
    if Q_TMA:
        mbarrier.wait(q_full.index(WHO), turn & 1)
    else:
        mine.store(gl.load(Q + b64 * q_b + h64 * q_h + at, mask=held, other=0.0))
        fence_async_shared()
        meet()

    local = first + WHO * ROWS + gl.arange(0, ROWS, s_row)
    rows = start + local
    row_ok = local < length
    peak = gl.full([ROWS], NOTHING, gl.float32, s_row)
    mass = gl.zeros([ROWS], gl.float32, s_row)
    acc = gl.zeros([ROWS, DP], gl.float32, o_lay)
    if HAS_INIT:
        token = rows_of(order, start, local, row_ok, Q_ORDER)
        before = gl.load(InitLse + line + token, mask=row_ok & (token >= 0), other=-float("inf"))
        seen = before > -float("inf")
        peak = gl.where(seen, before * LOG2E, NOTHING)
        mass = gl.where(seen, 1.0, 0.0)
        was = gl.expand_dims(to.to(gl.int64) * i_n, 1) + gl.expand_dims(dims * i_d, 0)
        old = gl.load(InitOut + b64 * i_b + h64 * i_h + was, mask=held, other=0.0)
        old = gl.convert_layout(old, o_lay).to(gl.float32)
        acc = gl.where(gl.expand_dims(gl.convert_layout(seen, o_row), 1), old, 0.0)

    if first + WHO * ROWS >= length:  # no rows: give every tile back, so that the other consumer's ring turns
        for i in range(total):
            slot = (done + i) % ST
            mbarrier.wait(k_full.index(slot), ((done + i) // ST) & 1)
            mbarrier.wait(v_full.index(slot), ((done + i) // ST) & 1)
            meet()  # one thread arrives for all: none may lag a whole turn behind
            mbarrier.arrive(k_free.index(slot), count=1)
            mbarrier.arrive(v_free.index(slot), count=1)
        total = 0
    if total > 0:
        none = gl.zeros([ROWS, BN], gl.float32, s_lay)
        slot = done % ST
        mbarrier.wait(k_full.index(slot), (done // ST) & 1)
        flying = warpgroup_mma(mine, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(flying,))
        meet()
        mbarrier.arrive(k_free.index(slot), count=1)
        if PLAIN and not HAS_PARTIAL:
            p, peak, mass, keep = absorb_plain(s, peak, mass, scale)
        else:
            if HAS_PARTIAL:
                if n_full > 0:
                    s = scores(s, 0, n_full, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, False, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
                else:
                    s = scores(s, 0, n_full, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, True, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
            else:
                s = scores(s, 0, n_full, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, False, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
            p, peak, mass, keep = absorb(s, peak, mass)
        if HAS_INIT:
            acc = acc * gl.expand_dims(gl.convert_layout(keep, o_row), 1)
        weights = gl.convert_layout(p.to(dtype), p_lay)

        for i in range(1, n_full):
            slot = (done + i) % ST
            last = (done + i - 1) % ST
            mbarrier.wait(k_full.index(slot), ((done + i) // ST) & 1)
            flying = warpgroup_mma(mine, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), ((done + i - 1) // ST) & 1)
            gathering = warpgroup_mma(weights, v_s.index(last), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(flying,))
            meet()
            mbarrier.arrive(k_free.index(slot), count=1)
            if PLAIN:
                p, peak, mass, keep = absorb_plain(s, peak, mass, scale)
            else:
                s = scores(s, i, n_full, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, False, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
                p, peak, mass, keep = absorb(s, peak, mass)
            weights_new = gl.convert_layout(p.to(dtype), p_lay)
            acc = warpgroup_mma_wait(0, deps=(gathering,))
            meet()
            mbarrier.arrive(v_free.index(last), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(keep, o_row), 1)
            weights = weights_new

        if HAS_PARTIAL:
            # Masks need registers: here P V is waited for first, and only the other consumer overlaps.
            for i in range(gl.maximum(n_full, 1), total):
                slot = (done + i) % ST
                last = (done + i - 1) % ST
                mbarrier.wait(k_full.index(slot), ((done + i) // ST) & 1)
                flying = warpgroup_mma(mine, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(last), ((done + i - 1) // ST) & 1)
                gathering = warpgroup_mma(weights, v_s.index(last), acc, is_async=True)
                s, acc = warpgroup_mma_wait(0, deps=(flying, gathering))
                meet()
                mbarrier.arrive(k_free.index(slot), count=1)
                mbarrier.arrive(v_free.index(last), count=1)
                s = scores(s, i, n_full, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, True, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
                p, peak, mass, keep = absorb(s, peak, mass)
                weights = gl.convert_layout(p.to(dtype), p_lay)
                acc = acc * gl.expand_dims(gl.convert_layout(keep, o_row), 1)

        last = (done + total - 1) % ST
        mbarrier.wait(v_full.index(last), ((done + total - 1) // ST) & 1)
        gathering = warpgroup_mma(weights, v_s.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(gathering,))
        meet()
        mbarrier.arrive(v_free.index(last), count=1)
    if Q_TMA:
        meet()
        mbarrier.arrive(q_free.index(WHO), count=1)

    empty = peak <= 1.0e-10 * NOTHING
    share = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, mass))
    acc = acc * gl.expand_dims(gl.convert_layout(share, o_row), 1)
    staged = o_s.index(WHO)
    meet()  # the last item's rows have left
    staged.store(acc.to(dtype))
    meet()
    to = rows_of(
        order, start, local_io, local_io < length, Q_ORDER
    )  # looked up again: registers are what the loop is short of
    at = gl.expand_dims(to.to(gl.int64) * o_n, 1) + gl.expand_dims(dims * o_d, 0)
    held = gl.expand_dims((local_io < length) & (to >= 0), 1) & gl.expand_dims(dims < D, 0)
    gl.store(Out + b64 * o_b + h64 * o_h + at, staged.load(io), mask=held)
    if NEED_LSE:
        token = rows_of(order, start, local, row_ok, Q_ORDER)
        lse = gl.where(empty, -float("inf"), peak * LN2 + gl.log(gl.where(empty, 1.0, mass)))
        gl.store(Lse + line + token, lse, mask=row_ok & (token >= 0))


# Not specialised: integers that change with length or plan, so that a new resolution compiles nothing.
UNSPECIALISED = (
    "items", "H", "N", "C", "K_WIDTH", "PK", "WORDS", "GROUP", "QSUB", "ROW_ITEMS", "ksub", "kv_stride", "guard", "scale",
    "k_row_b", "k_row_h", "k_col_h", "v_row_b", "v_row_h", "v_col_h", "q_row_b", "q_row_h", "q_col_h",
    "qs_b", "qs_h", "ql_b", "ql_h", "ks_b", "ks_h", "kl_b", "kl_h", "c_b", "c_h", "f_b", "f_h", "i_b", "i_h", "qo_b", "qo_h",
    "rb_b", "rb_h", "bb_b", "bb_h", "bb_r", "kb_b", "kb_h",
)  # fmt: skip


@gluon.jit(do_not_specialize=UNSPECIALISED)
def block_sparse_hopper(
    q_desc, k_desc, v_desc, Q, Out, Lse, InitOut, InitLse,
    QStart, QLen, KvStart, KvLen, Count, NFull, Index, Dense, Every, Launch, QOrder, Low, High, Coord, RowBits, BlockBias, KeyBias,
    q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
    q_b, q_h, q_n, q_d, o_b, o_h, o_n, o_d, io_b, io_h, io_n, io_d,
    qs_b, qs_h, ql_b, ql_h, ks_b, ks_h, kl_b, kl_h, c_b, c_h, f_b, f_h, i_b, i_h, qo_b, qo_h, rb_b, rb_h, bb_b, bb_h, bb_r, kb_b, kb_h,
    scale, items, H, N, C, K_WIDTH, PK, WORDS, GROUP, QSUB, ROW_ITEMS, ksub, kv_stride, guard,
    D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, EVEN: gl.constexpr, UNIFORM: gl.constexpr,
    TILED: gl.constexpr, HAS_PARTIAL: gl.constexpr, BOX: gl.constexpr, BITS: gl.constexpr, BLOCK_BIAS: gl.constexpr,
    KEY_BIAS: gl.constexpr, HAS_DENSE: gl.constexpr, Q_ORDER: gl.constexpr, Q_TMA: gl.constexpr, HAS_INIT: gl.constexpr,
    NEED_LSE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, ROWS, DP], q_desc.layout)
    o_s = gl.allocate_shared_memory(dtype, [2, ROWS, DP], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [ST, BN, DP], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [ST, BN, DP], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)

    ring = (k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free)
    starts = (Launch, QStart, QLen, qs_b, qs_h, ql_b, ql_h)
    lists = (Index, Every, i_b, i_h)
    counts = (Dense, NFull, Count, f_b, f_h, c_b, c_h)
    work = (starts, lists, counts, C, K_WIDTH, QSUB, ROW_ITEMS, H)
    blocks = (KvStart, KvLen, ks_b, ks_h, kl_b, kl_h)
    sizes = (ksub, kv_stride, PK, GROUP)
    place = (k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h, q_row_b, q_row_h, q_col_h)
    masks = (Low, High, Coord, guard, RowBits, WORDS, rb_b, rb_h, BlockBias, bb_b, bb_h, bb_r, KeyBias, kb_b, kb_h)
    query = (Q, q_b, q_h, q_n, q_d, QOrder, qo_b, qo_h)
    init = (InitOut, InitLse, io_b, io_h, io_n, io_d)
    output = (Out, Lse, o_b, o_h, o_n, o_d, N)
    gl.warp_specialize(
        [
            (consumer, (q_s, o_s, ring, items, work, blocks, sizes, masks, query, init, output, scale, 0, ST, D, DP, BN, UNIFORM, TILED,
                        EVEN, HAS_PARTIAL, BOX, BITS, BLOCK_BIAS, KEY_BIAS, HAS_DENSE, Q_ORDER, Q_TMA, HAS_INIT, NEED_LSE)),
            (consumer, (q_s, o_s, ring, items, work, blocks, sizes, masks, query, init, output, scale, 1, ST, D, DP, BN, UNIFORM, TILED,
                        EVEN, HAS_PARTIAL, BOX, BITS, BLOCK_BIAS, KEY_BIAS, HAS_DENSE, Q_ORDER, Q_TMA, HAS_INIT, NEED_LSE)),
            (producer, (q_desc, k_desc, v_desc, q_s, ring, items, work, blocks, sizes, place, ST, BN, UNIFORM, TILED, HAS_PARTIAL, HAS_DENSE, Q_TMA)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
