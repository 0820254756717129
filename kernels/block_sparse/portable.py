"""The portable Triton kernel: one program per tile of query rows, one loop over the listed key tiles.

Letters as in plan.py; D head dim, DP head dim padded to a power of two, BM query rows and BN keys of a tile, QSUB and
KSUB tiles of the longest query and key block.

* q's order and the inverse of the output are applied while loading and storing: they cost nothing. Keys are put in plan order
  once per call by a copy kernel (order.py), because every key is read by many programs.
* Full entries run without pair masks; ragged lengths, biases and pair masks are compile-time switches, so that plain plans pay
  for none of them.
* Query tiles with the longest lists start first.
* Scores are kept in log2 units; fp32 products are true fp32 (ieee), not tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The score of what a mask hides; real scores stay far above it. A power of two, so that scaling it is exact and the fused
# multiply-subtract of a row that has seen nothing yet is exactly 0: any rounding there would be astronomically large.
NOTHING = tl.constexpr(-1.2676506002282294e30)  # -2^100


@triton.jit
def absorb(acc, peak, mass, s, v, scale):
    """One online-softmax step. s [BM, BN] scores, log2 units after ``scale``, v [BN, DP].

    The scale rides on the exponent's multiply-add. What a mask hides is NOTHING, not -inf: a row that has seen nothing yet
    gathers mass exp2(0), which the first real key scales away exactly; rows that never see one are emptied at the end.
    """
    new = tl.maximum(peak, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    keep = tl.exp2(peak - new)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new, mass * keep + tl.sum(p, 1)


@triton.jit
def load_rows(base, rows, ok, dims, stride_n, stride_d, MASK: tl.constexpr, PAD_D: tl.constexpr, D: tl.constexpr):
    """Rows of [.., N, D] -> [rows, DP]."""
    at = base + rows[:, None] * stride_n + dims[None, :] * stride_d
    if MASK and PAD_D:
        return tl.load(at, mask=ok[:, None] & (dims < D)[None, :], other=0.0)
    elif MASK:
        return tl.load(at, mask=ok[:, None], other=0.0)
    elif PAD_D:
        return tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_columns(base, rows, ok, dims, stride_n, stride_d, MASK: tl.constexpr, PAD_D: tl.constexpr, D: tl.constexpr):
    """The same rows as columns -> [DP, rows]."""
    at = base + rows[None, :] * stride_n + dims[:, None] * stride_d
    if MASK and PAD_D:
        return tl.load(at, mask=ok[None, :] & (dims < D)[:, None], other=0.0)
    elif MASK:
        return tl.load(at, mask=ok[None, :], other=0.0)
    elif PAD_D:
        return tl.load(at, mask=(dims < D)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def query_rows(order, start, local, in_block, HAS_Q_ORDER: tl.constexpr):
    """The caller's rows of a query tile, as a row vector and a scalar row to add to it. Padding is -1."""
    if HAS_Q_ORDER:
        return tl.load(order + start + local, mask=in_block, other=-1).to(tl.int64), start.to(tl.int64) * 0
    else:
        return local, start.to(tl.int64)


@triton.jit
def listed_block(listing, slot, last):
    """Key block in a list slot; beyond the list its last entry, so that looking ahead stays inside. last may be -1 (empty)."""
    slot = tl.minimum(slot, last)
    return tl.load(listing + slot, mask=slot >= 0, other=0)


# Integers that change with length or plan: not specialised, so that a new resolution compiles nothing. The strides of q, k, v and
# out are: that they are multiples of 16 is what makes wide copies possible.
UNSPECIALISED = (
    "H", "N", "C", "K_WIDTH", "PQ", "PK", "WORDS", "GROUP", "QSUB", "ksub_any", "kv_stride", "scale",
    "qs_b", "qs_h", "ql_b", "ql_h", "ks_b", "ks_h", "kl_b", "kl_h", "c_b", "c_h", "f_b", "f_h", "i_b", "i_h", "qo_b", "qo_h",
    "rb_b", "rb_h", "bb_b", "bb_h", "bb_r", "kb_b", "kb_h", "pn_b", "pn_h", "li_b", "li_h", "lo_b", "lo_h",
)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def block_sparse_forward(
    Q, K, V, Out, Lse, InitOut, InitLse,
    QStart, QLen, KvStart, KvLen, Count, NFull, Index, Dense, Every, Launch, QOrder, Low, High, Coord, RowBits, BlockBias, KeyBias,
    ProxyK, ProxyV, ProxyN, ProxyVar, Listed,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, io_b, io_h, io_n, io_d, p_b, p_h, p_c, pv_b, pv_h, pv_c, var_b, var_h, var_c,
    qs_b, qs_h, ql_b, ql_h, ks_b, ks_h, kl_b, kl_h, c_b, c_h, f_b, f_h, i_b, i_h, qo_b, qo_h, rb_b, rb_h, bb_b, bb_h, bb_r, kb_b, kb_h, pn_b, pn_h, li_b, li_h, lo_b, lo_h,
    scale, H, N, C, K_WIDTH, PQ, PK, WORDS, GROUP, QSUB, ksub_any, kv_stride,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KSUB: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, UNIFORM: tl.constexpr, TILED: tl.constexpr, HAS_PARTIAL: tl.constexpr, AXES: tl.constexpr, HAS_BITS: tl.constexpr, HAS_BLOCK_BIAS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, HAS_PROXIES: tl.constexpr, HAS_VAR: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_Q_ORDER: tl.constexpr,
    HAS_INIT: tl.constexpr, NEED_LSE: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    sub = tl.program_id(0) % QSUB
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    r = tl.load(Launch + b * lo_b + h * lo_h + tl.program_id(0) // QSUB)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    hk = h64 // GROUP
    length = tl.load(QLen + b * ql_b + h * ql_h + r)
    local = sub * BM + tl.arange(0, BM)
    in_block = local < length
    row_ok = in_block
    start = tl.load(QStart + b * qs_b + h * qs_h + r)
    rows, base = query_rows(QOrder + b64 * qo_b + h64 * qo_h, start, local, in_block, HAS_Q_ORDER)
    row_ok = row_ok & (rows >= 0)
    dims = tl.arange(0, DP)
    PAD_D: tl.constexpr = DP != D
    q = load_rows(Q + b64 * q_b + h64 * q_h + base * q_n, rows, row_ok, dims, q_n, q_d, True, PAD_D, D)
    kbase, vbase = K + b64 * k_b + hk * k_h, V + b64 * v_b + hk * v_h
    peak = tl.full([BM], NOTHING, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    if HAS_INIT:
        before = tl.load(InitLse + (b64 * H + h64) * N + base + rows, mask=row_ok, other=-float("inf"))
        seen = before > -float("inf")
        peak = tl.where(seen, before * LOG2E, NOTHING)
        mass = tl.where(seen, 1.0, 0.0)
        acc = load_rows(
            InitOut + b64 * io_b + h64 * io_h + base * io_n, rows, row_ok & seen, dims, io_n, io_d, True, PAD_D, D
        ).to(tl.float32)

    listing = Index + b64 * i_b + h64 * i_h + r.to(tl.int64) * K_WIDTH
    starts, lengths = KvStart + b * ks_b + h * ks_h, KvLen + b * kl_b + h * kl_h
    n_full = tl.load(NFull + b * f_b + h * f_h + r)
    n_all = n_full
    if HAS_PARTIAL:
        n_all = tl.load(Count + b * c_b + h * c_h + r)
    if HAS_DENSE:
        dense = tl.load(Dense + r)
        n_full = tl.where(dense != 0, C, n_full)
        n_all = tl.where(dense != 0, C, n_all)
        listing = tl.where(dense != 0, Every, listing)
    live = sub * BM < length  # blocks shorter than the longest leave their last programs without rows
    n_full = tl.where(live, n_full, 0)
    n_all = tl.where(live, n_all, 0)
    ksub = KSUB if KSUB > 0 else ksub_any
    keys = tl.arange(0, BN)
    PLAIN: tl.constexpr = POSITIVE and not HAS_BLOCK_BIAS and not HAS_KEY_BIAS

    # Addresses are looked up ahead: block ids two tiles, starts and lengths one tile, so that no load of keys waits for them.
    c = listed_block(listing, 0, n_all - 1)
    c_next = listed_block(listing, 1 // ksub, n_all - 1)
    first = c * kv_stride if UNIFORM else tl.load(starts + c)
    size = tl.minimum(kv_stride, PK - first) if TILED else tl.load(lengths + c)
    for it in tl.range(0, n_full * ksub, num_stages=STAGES):
        begin = first + (it % ksub) * BN
        key_ok = keys < size - (it % ksub) * BN
        k = load_columns(kbase + begin.to(tl.int64) * k_n, keys, key_ok, dims, k_n, k_d, not EVEN, PAD_D, D)
        qk = tl.dot(q, k, input_precision="ieee")
        v = load_rows(vbase + begin.to(tl.int64) * v_n, keys, key_ok, dims, v_n, v_d, not EVEN, PAD_D, D)
        if PLAIN:
            if not EVEN:  # noqa: SIM102  (a compile-time switch around a run-time test)
                if size - (it % ksub) * BN < BN:  # only the last tile of a block
                    qk = tl.where(key_ok[None, :], qk, NOTHING)
            acc, peak, mass = absorb(acc, peak, mass, qk, v, scale)
        else:
            s = qk * scale
            if HAS_BLOCK_BIAS:
                s += tl.load(BlockBias + b64 * bb_b + h64 * bb_h + r.to(tl.int64) * bb_r + c) * LOG2E
            if HAS_KEY_BIAS:
                s += tl.load(KeyBias + b64 * kb_b + h64 * kb_h + begin + keys, mask=key_ok, other=0.0)[None, :] * LOG2E
            s = tl.where(key_ok[None, :], tl.maximum(s, NOTHING), NOTHING)
            acc, peak, mass = absorb(acc, peak, mass, s, v, 1.0)
        c = c_next
        first = c * kv_stride if UNIFORM else tl.load(starts + c)
        size = tl.minimum(kv_stride, PK - first) if TILED else tl.load(lengths + c)
        c_next = listed_block(listing, (it + 2) // ksub, n_all - 1)

    if HAS_PARTIAL:
        for it in tl.range(n_full * ksub, n_all * ksub, num_stages=STAGES):
            begin = first + (it % ksub) * BN
            key_ok = keys < size - (it % ksub) * BN
            k = load_columns(kbase + begin.to(tl.int64) * k_n, keys, key_ok, dims, k_n, k_d, True, PAD_D, D)
            s = tl.dot(q, k, input_precision="ieee") * scale
            v = load_rows(vbase + begin.to(tl.int64) * v_n, keys, key_ok, dims, v_n, v_d, True, PAD_D, D)
            if HAS_BLOCK_BIAS:
                s += tl.load(BlockBias + b64 * bb_b + h64 * bb_h + r.to(tl.int64) * bb_r + c) * LOG2E
            if HAS_KEY_BIAS:
                s += tl.load(KeyBias + b64 * kb_b + h64 * kb_h + begin + keys, mask=key_ok, other=0.0)[None, :] * LOG2E
            ok = key_ok[None, :] & row_ok[:, None]
            for a in tl.static_range(AXES):
                low = tl.load(Low + a * PQ + start + local, mask=in_block, other=0)
                high = tl.load(High + a * PQ + start + local, mask=in_block, other=0)
                coord = tl.load(Coord + a * PK + begin + keys, mask=key_ok, other=0)
                ok = ok & (low[:, None] <= coord[None, :]) & (coord[None, :] < high[:, None])
            if HAS_BITS:
                word = tl.load(
                    RowBits + b64 * rb_b + h64 * rb_h + (start + local).to(tl.int64) * WORDS + c // 32,
                    mask=in_block,
                    other=0,
                )
                ok = ok & (((word >> (c % 32)) & 1) != 0)[:, None]
            s = tl.where(ok, tl.maximum(s, NOTHING), NOTHING)
            acc, peak, mass = absorb(acc, peak, mass, s, v, 1.0)
            c = c_next
            first = c * kv_stride if UNIFORM else tl.load(starts + c)
            size = tl.minimum(kv_stride, PK - first) if TILED else tl.load(lengths + c)
            c_next = listed_block(listing, (it + 2) // ksub, n_all - 1)

    if HAS_PROXIES:
        words = Listed + b64 * li_b + h64 * li_h + r.to(tl.int64) * ((C + 31) // 32)
        counts = ProxyN + b64 * pn_b + h64 * pn_h
        for at in tl.range(0, tl.where(live, C, 0), BN, num_stages=1):
            block = at + keys
            inside = block < C
            pk = load_columns(ProxyK + b64 * p_b + hk * p_h, block, inside, dims, p_c, 1, True, PAD_D, D)
            pv = load_rows(ProxyV + b64 * pv_b + hk * pv_h, block, inside, dims, pv_c, 1, True, PAD_D, D)
            s = tl.dot(q, pk, input_precision="ieee") * scale
            if HAS_VAR:
                var = load_columns(ProxyVar + b64 * var_b + hk * var_h, block, inside, dims, var_c, 1, True, PAD_D, D)
                square = q.to(tl.float32) * q.to(tl.float32)
                # scale is in log2 units; scale^2 / 2 of the natural score is scale^2 / 2 * LN2 of this one
                s += tl.dot(square.to(q.dtype), var.to(q.dtype), input_precision="ieee") * (0.5 * scale * scale * LN2)
            n = tl.load(counts + block, mask=inside, other=0.0)
            s += tl.log2(tl.maximum(n, 1e-30))[None, :]
            if HAS_BLOCK_BIAS:
                s += (
                    tl.load(
                        BlockBias + b64 * bb_b + h64 * bb_h + r.to(tl.int64) * bb_r + block, mask=inside, other=0.0
                    )[None, :]
                    * LOG2E
                )
            hidden = (tl.load(words + block // 32, mask=inside, other=-1) >> (block % 32)) & 1
            s = tl.where((inside & (n > 0) & (hidden == 0))[None, :], tl.maximum(s, NOTHING), NOTHING)
            acc, peak, mass = absorb(acc, peak, mass, s, pv, 1.0)

    empty = peak <= 1.0e-10 * NOTHING  # NOTHING may have been scaled
    out = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, mass)[:, None])
    # Looked up again rather than kept through the loop: registers are what the loop is short of.
    start = tl.load(QStart + b * qs_b + h * qs_h + r)
    rows, base = query_rows(QOrder + b64 * qo_b + h64 * qo_h, start, local, in_block, HAS_Q_ORDER)
    row_ok = in_block & (rows >= 0)
    to = Out + b64 * o_b + h64 * o_h + base * o_n + rows[:, None] * o_n + dims[None, :] * o_d
    if PAD_D:
        tl.store(to, out.to(Out.dtype.element_ty), mask=row_ok[:, None] & (dims < D)[None, :])
    else:
        tl.store(to, out.to(Out.dtype.element_ty), mask=row_ok[:, None])
    if NEED_LSE:
        lse = tl.where(empty, -float("inf"), peak * LN2 + tl.log(tl.where(empty, 1.0, mass)))
        tl.store(Lse + (b64 * H + h64) * N + base + rows, lse, mask=row_ok)
