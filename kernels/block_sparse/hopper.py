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
* Where only the sequence's end cuts a key block (CUT), lists are walked from their end: the block comes first, before the loop, whose tiles
  are all whole. A test for it inside the loop took 8 to 14 % of the time.
* Box masks are packed: a query's bounds and a key's coordinates lie in one 32-bit word each, one field per axis with a guard bit, and one
  subtraction tests all axes (see ``pack_box``).
* Where every key block is one box of cells (windows on a grid), tensor cores mask as well: key j of a block is a one-hot vector of its
  place along each axis, the same in all blocks, a query has a very low number where a place lies outside its window, and their product
  is added to the scores. A mask costs sixteen more columns of the product then, and next to nothing elsewhere.
* Scores are kept in log2 units.
* Proxies follow the tiles of an item's list through the same ring (hopper_proxies.py).
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

from foveal.kernels.block_sparse.hopper_proxies import (
    attend_proxies,
    needs_queries,
    proxy_tiles,
    send_proxies,
    wide_strides,
)
from foveal.kernels.block_sparse.hopper_steps import (
    LOWEST,
    NOTHING,
    ROWS,
    absorb,
    absorb_plain,
    block_start,
    cell_bounds,
    cell_hidden,
    cell_origin,
    finish,
    item_at,
    keys_left,
    meet,
    next_tile,
    rows_of,
    scores,
    send_queries,
    this_program,
)
from foveal.kernels.block_sparse.hopper_tiles import careful_step, step


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, var_desc, q_s, ring, items, programs, work, blocks, sizes, place, proxies, proxy_place,
    ST: gl.constexpr, BN: gl.constexpr, UNIFORM: gl.constexpr, CUT: gl.constexpr, HAS_PARTIAL: gl.constexpr,
    HAS_DENSE: gl.constexpr, Q_TMA: gl.constexpr, PROXIES: gl.constexpr, VAR: gl.constexpr,
):  # fmt: skip
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    KvStart, KvLen, ks_b, ks_h, kl_b, kl_h = blocks
    ksub, kv_stride, PK, GROUP = sizes
    k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h, q_row_b, q_row_h, q_col_h = place
    done = 0  # tiles so far
    turn = 0  # items with tiles so far
    for item in range(this_program(items), items, programs):
        b, h, r, first, start, length, listing, n_full, masked = item_at(item, work, ksub, CUT, HAS_PARTIAL, HAS_DENSE)
        total = n_full + masked
        hk = h // GROUP
        key_starts = KvStart + b * ks_b + h * ks_h
        k_row, k_col = b * k_row_b + hk * k_row_h, hk * k_col_h
        v_row, v_col = b * v_row_b + hk * v_row_h, hk * v_col_h
        sub = 0
        for i in range(total):
            slot = (done + i) % ST
            phase = ((done + i) // ST) & 1
            at = block_start(gl.load(listing), key_starts, kv_stride, UNIFORM) + sub * BN
            mbarrier.wait(k_free.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [k_row + at, k_col], k_full.index(slot), k_s.index(slot))
            if Q_TMA:
                if i == 0:  # after the first keys, because the last item's queries may still be in use
                    send_queries(q_desc, q_s, ring, place, b, h, start, first, turn)
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [v_row + at, v_col], v_full.index(slot), v_s.index(slot))
            listing, sub = next_tile(listing, sub, ksub, CUT)
        done += total
        if PROXIES:
            tiles = proxy_tiles(proxies, first, length)
            if Q_TMA:
                if (total == 0) & (tiles > 0):
                    send_queries(q_desc, q_s, ring, place, b, h, start, first, turn)
            send_proxies(pk_desc, pv_desc, var_desc, ring, proxy_place, done, tiles, b, hk, ST, BN, VAR)
            done += tiles * (2 if VAR else 1)
        turn += needs_queries(total, first, length, PROXIES).to(gl.int32)


@gluon.jit
def consumer(
    q_s, o_s, ring, items, programs, work, blocks, sizes, masks, cells, proxies, query, init, output, scale,
    WHO: gl.constexpr, ST: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, UNIFORM: gl.constexpr,
    TILED: gl.constexpr, EVEN: gl.constexpr, CUT: gl.constexpr, HAS_PARTIAL: gl.constexpr, BOX: gl.constexpr, CELLS: gl.constexpr, BITS: gl.constexpr,
    BLOCK_BIAS: gl.constexpr, KEY_BIAS: gl.constexpr, HAS_DENSE: gl.constexpr, Q_ORDER: gl.constexpr, Q_TMA: gl.constexpr,
    HAS_INIT: gl.constexpr, NEED_LSE: gl.constexpr, PROXIES: gl.constexpr, VAR: gl.constexpr,
):  # fmt: skip
    ksub, kv_stride, PK, GROUP = sizes
    heads = work
    if PROXIES:
        masks, query, output, heads = wide_strides(masks, query, output, work)
    done = 0
    turn = 0
    mine = this_program(items)
    b, h, r, first, start, length, listing, n_full, masked = item_at(mine, work, ksub, CUT, HAS_PARTIAL, HAS_DENSE)
    for item in range(mine, items, programs):
        total = n_full + masked
        acc, peak, mass = walk(
            b, h, r, first, start, length, listing, n_full, total, done, turn,
            q_s, ring, blocks, sizes, masks, cells, query, scale,
            WHO, ST, D, DP, BN, UNIFORM, TILED, EVEN, CUT, HAS_PARTIAL, BOX, CELLS, BITS, BLOCK_BIAS, KEY_BIAS, Q_ORDER, Q_TMA, PROXIES,
        )  # fmt: skip
        done += total
        turn += needs_queries(total, first, length, PROXIES).to(gl.int32)
        # Looked up again, because registers are what the walk is short of, together with what the next item is.
        b, h, r, first, start, length, listing, n_full, masked = item_at(item, work, ksub, CUT, HAS_PARTIAL, HAS_DENSE)
        if PROXIES:
            tiles = proxy_tiles(proxies, first, length)
            acc, peak, mass = attend_proxies(
                acc, peak, mass, b, h, r, tiles, done, q_s.index(WHO), ring, proxies, masks, scale,
                ST, BN, BLOCK_BIAS, VAR,
            )  # fmt: skip
            done += tiles * (2 if VAR else 1)
            if Q_TMA:
                if tiles > 0:
                    meet()
                    mbarrier.arrive(ring[7].index(WHO), count=1)
        later = item + programs
        b2, h2, r2, first2, start2, length2, listing2, n_full2, masked2 = item_at(
            gl.where(later < items, later, item), work, ksub, CUT, HAS_PARTIAL, HAS_DENSE
        )
        finish(
            b, h, first, start, length, acc, peak, mass, o_s, heads, query, init, output, WHO, D, DP, Q_ORDER, HAS_INIT, NEED_LSE
        )  # fmt: skip
        b, h, r, first, start = b2, h2, r2, first2, start2
        length, listing, n_full, masked = length2, listing2, n_full2, masked2


@gluon.jit
def walk(
    b, h, r, first, start, length, listing, n_full, total, done, turn,
    q_s, ring, blocks, sizes, masks, cells, query, scale,
    WHO: gl.constexpr, ST: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, UNIFORM: gl.constexpr,
    TILED: gl.constexpr, EVEN: gl.constexpr, CUT: gl.constexpr, HAS_PARTIAL: gl.constexpr, BOX: gl.constexpr, CELLS: gl.constexpr, BITS: gl.constexpr,
    BLOCK_BIAS: gl.constexpr, KEY_BIAS: gl.constexpr, Q_ORDER: gl.constexpr, Q_TMA: gl.constexpr, PROXIES: gl.constexpr,
):  # fmt: skip
    """One item: 64 query rows over the tiles of their list. -> gathered values, peak, mass"""
    s_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DP, 16])
    p_lay: gl.constexpr = gl.DotOperandLayout(0, o_lay, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_lay)
    s_col: gl.constexpr = gl.SliceLayout(0, s_lay)
    across: gl.constexpr = DP // 8
    io: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    PLAIN: gl.constexpr = not BLOCK_BIAS and not KEY_BIAS
    k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free = ring
    KvStart, KvLen, ks_b, ks_h, kl_b, kl_h = blocks
    ksub, kv_stride, PK, GROUP = sizes
    Q, q_b, q_h, q_n, q_d, QOrder, qo_b, qo_h = query
    Low, High, Coord, guard, Bits, words, rb_b, rb_h, BlockBias, bb_b, bb_h, bb_r, KeyBias, kb_b, kb_h = masks
    dtype: gl.constexpr = k_s.dtype
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    key_lengths = KvLen + b * kl_b + h * kl_h
    lists = (listing, KvStart + b * ks_b + h * ks_h, key_lengths)
    hides = (
        Low, High, Coord, guard, Bits + b64 * rb_b + h64 * rb_h, words,
        BlockBias + b64 * bb_b + h64 * bb_h + r.to(gl.int64) * bb_r, KeyBias + b64 * kb_b + h64 * kb_h,
    )  # fmt: skip
    mine = q_s.index(WHO)
    if Q_TMA:
        if needs_queries(total, first, length, PROXIES):
            mbarrier.wait(q_full.index(WHO), turn & 1)
    else:
        dims = gl.arange(0, DP, gl.SliceLayout(0, io))
        local_io = first + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, io))
        to = rows_of(QOrder + b64 * qo_b + h64 * qo_h, start, local_io, local_io < length, Q_ORDER)
        held = gl.expand_dims((local_io < length) & (to >= 0), 1) & gl.expand_dims(dims < D, 0)
        at = gl.expand_dims(to.to(gl.int64) * q_n, 1) + gl.expand_dims(dims * q_d, 0)
        mine.store(gl.load(Q + b64 * q_b + h64 * q_h + at, mask=held, other=0.0))
        fence_async_shared()
        meet()

    local = first + WHO * ROWS + gl.arange(0, ROWS, s_row)
    rows = start + local
    row_ok = local < length
    if CELLS:
        hot_s, Dims, PQ = cells
        bounds = cell_bounds(Low, High, Dims, PQ, start, first + WHO * ROWS, length, s_lay, CELLS)
    peak = gl.full([ROWS], LOWEST, gl.float32, s_row)
    mass = gl.zeros([ROWS], gl.float32, s_row)
    acc = gl.zeros([ROWS, DP], gl.float32, o_lay)
    tiles = total
    if first + WHO * ROWS >= length:  # no rows: give every tile back, so that the other consumer's ring turns
        for i in range(total):
            slot = (done + i) % ST
            mbarrier.wait(k_full.index(slot), ((done + i) // ST) & 1)
            mbarrier.wait(v_full.index(slot), ((done + i) // ST) & 1)
            meet()  # one thread arrives for all: none may lag a whole turn behind
            mbarrier.arrive(k_free.index(slot), count=1)
            mbarrier.arrive(v_free.index(slot), count=1)
        tiles = 0
        n_full = 0
    weights = gl.zeros([ROWS, BN], dtype, p_lay)
    if tiles > 0:
        none = gl.zeros([ROWS, BN], gl.float32, s_lay)
        slot = done % ST
        mbarrier.wait(k_full.index(slot), (done // ST) & 1)
        flying = warpgroup_mma(mine, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(flying,))
        meet()
        mbarrier.arrive(k_free.index(slot), count=1)
        if CELLS:
            if n_full == 0:
                hidden = cell_hidden(cell_origin(gl.load(listing), Coord, s_lay, CELLS), bounds)
                flying = warpgroup_mma(hidden, hot_s.permute((1, 0)), s, is_async=True)
                s = warpgroup_mma_wait(0, deps=(flying,))
        if PLAIN and (CELLS or not HAS_PARTIAL):
            if not EVEN:
                left = keys_left(gl.load(listing), 0, key_lengths, kv_stride, PK, BN, TILED)
                s = gl.where(gl.expand_dims(gl.arange(0, BN, s_col) < left, 0), s, NOTHING)
            p, peak, mass, keep = absorb_plain(s, peak, mass, scale)
        else:
            if HAS_PARTIAL:
                if n_full > 0:
                    s = scores(s, 0, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, False, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
                else:
                    s = scores(s, 0, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, True, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
            else:
                s = scores(s, 0, lists, sizes, hides, rows, row_ok, scale, s_lay, BN, UNIFORM, TILED, EVEN, False, BOX, BITS, BLOCK_BIAS, KEY_BIAS)  # fmt: skip
            p, peak, mass, keep = absorb(s, peak, mass)
        weights = gl.convert_layout(p.to(dtype), p_lay)

        if PLAIN and (EVEN or CUT):
            for i in range(1, n_full):
                acc, weights, peak, mass = step(
                    acc, weights, peak, mass, BN, 0, mine, ring, q_s, done + i, scale, s_lay, ST, BN, False, 0
                )
        elif PLAIN:
            # A tile cut short has a loop body of its own: a branch around the mask alone would end what runs beside it.
            entry, sub = next_tile(listing, 0, ksub, False)
            short = keys_left(gl.load(entry, mask=n_full > 1, other=0), sub, key_lengths, kv_stride, PK, BN, TILED)
            for i in range(1, n_full):
                left = short
                entry, sub = next_tile(entry, sub, ksub, False)
                short = keys_left(
                    gl.load(entry, mask=i + 1 < n_full, other=0), sub, key_lengths, kv_stride, PK, BN, TILED
                )
                if CELLS:  # short of registers: one body for both
                    acc, weights, peak, mass = step(
                        acc, weights, peak, mass, left, 0, mine, ring, q_s, done + i, scale, s_lay, ST, BN, True, 0
                    )
                elif left < BN:
                    acc, weights, peak, mass = step(
                        acc, weights, peak, mass, left, 0, mine, ring, q_s, done + i, scale, s_lay, ST, BN, True, 0
                    )
                else:
                    acc, weights, peak, mass = step(
                        acc, weights, peak, mass, left, 0, mine, ring, q_s, done + i, scale, s_lay, ST, BN, False, 0
                    )
        else:
            for i in range(1, n_full):
                acc, weights, peak, mass = careful_step(
                    acc, weights, peak, mass, i, done, mine, ring, lists, sizes, hides, rows, row_ok, scale, s_lay,
                    ST, BN, UNIFORM, TILED, EVEN, False, BOX, BITS, BLOCK_BIAS, KEY_BIAS, not HAS_PARTIAL,
                )  # fmt: skip

        if CELLS:
            here = cell_origin(
                gl.load(listing + gl.maximum(n_full, 1), mask=tiles > gl.maximum(n_full, 1), other=0),
                Coord,
                s_lay,
                CELLS,
            )
            for i in range(gl.maximum(n_full, 1), tiles):
                hidden = cell_hidden(here, bounds)
                here = cell_origin(gl.load(listing + i + 1, mask=i + 1 < tiles, other=0), Coord, s_lay, CELLS)
                acc, weights, peak, mass = step(
                    acc,
                    weights,
                    peak,
                    mass,
                    BN,
                    hidden,
                    mine,
                    ring,
                    hot_s,
                    done + i,
                    scale,
                    s_lay,
                    ST,
                    BN,
                    False,
                    CELLS,
                )
        elif HAS_PARTIAL:
            for i in range(gl.maximum(n_full, 1), tiles):
                acc, weights, peak, mass = careful_step(
                    acc, weights, peak, mass, i, done, mine, ring, lists, sizes, hides, rows, row_ok, scale, s_lay,
                    ST, BN, UNIFORM, TILED, EVEN, True, BOX, BITS, BLOCK_BIAS, KEY_BIAS, False,
                )  # fmt: skip
    if Q_TMA and not PROXIES:
        if total > 0:
            meet()
            mbarrier.arrive(q_free.index(WHO), count=1)
    if tiles > 0:
        last = (done + tiles - 1) % ST
        mbarrier.wait(v_full.index(last), ((done + tiles - 1) // ST) & 1)
        gathering = warpgroup_mma(weights, v_s.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(gathering,))
        meet()
        mbarrier.arrive(v_free.index(last), count=1)
    return acc, peak, mass


# Not specialised: integers that change with length or plan, so that a new resolution compiles nothing.
UNSPECIALISED = (
    "items", "programs", "H", "N", "PK", "WORDS", "GROUP", "QSUB", "ROW_ITEMS", "ksub", "kv_stride", "guard", "PQ", "scale",
    "k_row_b", "k_row_h", "k_col_h", "v_row_b", "v_row_h", "v_col_h", "q_row_b", "q_row_h", "q_col_h",
    "ks_b", "ks_h", "kl_b", "kl_h", "r_b", "r_h", "qo_b", "qo_h", "rb_b", "rb_h", "bb_b", "bb_h", "bb_r", "kb_b", "kb_h",
    "C", "pooled", "pn_b", "pn_h", "li_b", "li_h", "pk_row_b", "pk_row_h", "pk_col_h", "pv_row_b", "pv_row_h", "pv_col_h", "var_row_b", "var_row_h",
    "var_col_h",
)  # fmt: skip


@gluon.jit(do_not_specialize=UNSPECIALISED)
def block_sparse_hopper(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, var_desc, Q, Out, Lse, InitOut, InitLse,
    KvStart, KvLen, Index, Rows, Every, QOrder, Low, High, Coord, Hot, Dims, RowBits, BlockBias, KeyBias,
    q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
    q_b, q_h, q_n, q_d, o_b, o_h, o_n, o_d, io_b, io_h, io_n, io_d,
    ks_b, ks_h, kl_b, kl_h, r_b, r_h, qo_b, qo_h, rb_b, rb_h, bb_b, bb_h, bb_r, kb_b, kb_h,
    scale, items, programs, H, N, PK, WORDS, GROUP, QSUB, ROW_ITEMS, ksub, kv_stride, guard, PQ,
    ProxyN, Listed, C, pooled, pn_b, pn_h, li_b, li_h, pk_row_b, pk_row_h, pk_col_h, pv_row_b, pv_row_h, pv_col_h, var_row_b, var_row_h, var_col_h,
    D: gl.constexpr, DP: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, EVEN: gl.constexpr, UNIFORM: gl.constexpr,
    TILED: gl.constexpr, CUT: gl.constexpr, HAS_PARTIAL: gl.constexpr, BOX: gl.constexpr, CELLS: gl.constexpr, BITS: gl.constexpr, BLOCK_BIAS: gl.constexpr,
    KEY_BIAS: gl.constexpr, HAS_DENSE: gl.constexpr, Q_ORDER: gl.constexpr, Q_TMA: gl.constexpr, HAS_INIT: gl.constexpr,
    NEED_LSE: gl.constexpr, PROXIES: gl.constexpr, VAR: gl.constexpr,
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

    hot_s = k_s
    if CELLS:  # every tile's mask product has this factor
        hot_lay: gl.constexpr = gl.BlockedLayout([1, 8], [64 // CELLS * 4, CELLS // 8], [gl.num_warps(), 1], [1, 0])
        hot_at = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, hot_lay)) * CELLS, 1) + gl.expand_dims(
            gl.arange(0, CELLS, gl.SliceLayout(0, hot_lay)), 0
        )
        hot_s = gl.allocate_shared_memory(
            gl.bfloat16,
            [BN, CELLS],
            gl.NVMMASharedLayout.get_default_for([BN, CELLS], gl.bfloat16),
            gl.load(Hot + hot_at),
        )
        fence_async_shared()
        meet()
    cells = (hot_s, Dims, PQ)
    ring = (k_s, v_s, k_full, k_free, v_full, v_free, q_full, q_free)
    work = (Rows, r_b, r_h, Index, Every, QSUB, ROW_ITEMS, H)
    blocks = (KvStart, KvLen, ks_b, ks_h, kl_b, kl_h)
    sizes = (ksub, kv_stride, PK, GROUP)
    place = (k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h, q_row_b, q_row_h, q_col_h)
    masks = (Low, High, Coord, guard, RowBits, WORDS, rb_b, rb_h, BlockBias, bb_b, bb_h, bb_r, KeyBias, kb_b, kb_h)
    proxies = (pooled, C, ProxyN, pn_b, pn_h, Listed, li_b, li_h)
    proxy_place = (pk_row_b, pk_row_h, pk_col_h, pv_row_b, pv_row_h, pv_col_h, var_row_b, var_row_h, var_col_h)
    query = (Q, q_b, q_h, q_n, q_d, QOrder, qo_b, qo_h)
    init = (InitOut, InitLse, io_b, io_h, io_n, io_d)
    output = (Out, Lse, o_b, o_h, o_n, o_d, N)
    gl.warp_specialize(
        [
            (consumer, (q_s, o_s, ring, items, programs, work, blocks, sizes, masks, cells, proxies, query, init, output, scale, 0, ST, D, DP, BN, UNIFORM, TILED,
                        EVEN, CUT, HAS_PARTIAL, BOX, CELLS, BITS, BLOCK_BIAS, KEY_BIAS, HAS_DENSE, Q_ORDER, Q_TMA, HAS_INIT, NEED_LSE,
                        PROXIES, VAR)),
            (consumer, (q_s, o_s, ring, items, programs, work, blocks, sizes, masks, cells, proxies, query, init, output, scale, 1, ST, D, DP, BN, UNIFORM, TILED,
                        EVEN, CUT, HAS_PARTIAL, BOX, CELLS, BITS, BLOCK_BIAS, KEY_BIAS, HAS_DENSE, Q_ORDER, Q_TMA, HAS_INIT, NEED_LSE,
                        PROXIES, VAR)),
            (producer, (q_desc, k_desc, v_desc, pk_desc, pv_desc, var_desc, q_s, ring, items, programs, work, blocks, sizes, place, proxies,
                        proxy_place, ST, BN, UNIFORM, CUT, HAS_PARTIAL, HAS_DENSE, Q_TMA, PROXIES, VAR)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
