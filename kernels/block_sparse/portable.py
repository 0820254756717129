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


@triton.jit
def absorb(acc, peak, mass, s, v):
    """One online-softmax step. s [BM, BN] scores in log2 units, v [BN, DP]."""
    new = tl.maximum(peak, tl.max(s, 1))
    safe = tl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing yet
    p = tl.exp2(s - safe[:, None])
    keep = tl.exp2(peak - safe)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new, mass * keep + tl.sum(p, 1)


@triton.jit
def absorb_plain(acc, peak, mass, qk, v, scale):
    """The same where every score is finite: the scale rides on the exponent's multiply-add."""
    new = tl.maximum(peak, tl.max(qk, 1) * scale)
    p = tl.exp2(qk * scale - new[:, None])
    keep = tl.exp2(peak - new)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new, mass * keep + tl.sum(p, 1)


@triton.jit
def load_tile(base, rows, ok, dims, stride_n, stride_d, MASK: tl.constexpr, PAD_D: tl.constexpr, D: tl.constexpr):
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


# Integers that change with length or plan: not specialised, so that a new resolution compiles nothing.
UNSPECIALISED = (
    "H", "N", "C", "K_WIDTH", "PQ", "PK", "WORDS", "GROUP", "QSUB", "ksub_any", "scale",
    "qs_b", "qs_h", "ql_b", "ql_h", "ks_b", "ks_h", "kl_b", "kl_h", "c_b", "c_h", "f_b", "f_h", "i_b", "i_h", "qo_b", "qo_h",
    "rb_b", "rb_h", "bb_b", "bb_h", "bb_r", "kb_b", "kb_h", "pn_b", "pn_h", "li_b", "li_h", "q_b", "k_b", "v_b", "o_b", "io_b", "p_b", "pv_b", "var_b",
)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def block_sparse_forward(
    Q, K, V, Out, Lse, InitOut, InitLse,
    QStart, QLen, KvStart, KvLen, Count, NFull, Index, Dense, Launch, QOrder, Low, High, Coord, RowBits, BlockBias, KeyBias,
    ProxyK, ProxyV, ProxyN, ProxyVar, Listed,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, io_b, io_h, io_n, io_d, p_b, p_h, p_c, pv_b, pv_h, pv_c, var_b, var_h, var_c,
    qs_b, qs_h, ql_b, ql_h, ks_b, ks_h, kl_b, kl_h, c_b, c_h, f_b, f_h, i_b, i_h, qo_b, qo_h, rb_b, rb_h, bb_b, bb_h, bb_r, kb_b, kb_h, pn_b, pn_h, li_b, li_h,
    scale, H, N, C, K_WIDTH, PQ, PK, WORDS, GROUP, QSUB, ksub_any,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KSUB: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, UNIFORM: tl.constexpr, HAS_PARTIAL: tl.constexpr, AXES: tl.constexpr, HAS_BITS: tl.constexpr, HAS_BLOCK_BIAS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, HAS_PROXIES: tl.constexpr, HAS_VAR: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_Q_ORDER: tl.constexpr,
    HAS_INIT: tl.constexpr, NEED_LSE: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    r = tl.load(Launch + tl.program_id(0) // QSUB)
    sub = tl.program_id(0) % QSUB
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    length = tl.load(QLen + b * ql_b + h * ql_h + r)
    if sub * BM < length:
        b64, h64 = b.to(tl.int64), h.to(tl.int64)
        hk = h64 // GROUP
        local = sub * BM + tl.arange(0, BM)
        row_ok = local < length
        pos = tl.load(QStart + b * qs_b + h * qs_h + r) + local
        rows = pos.to(tl.int64)
        if HAS_Q_ORDER:
            rows = tl.load(QOrder + b64 * qo_b + h64 * qo_h + pos, mask=row_ok, other=-1).to(tl.int64)
            row_ok = row_ok & (rows >= 0)
        dims = tl.arange(0, DP)
        PAD_D: tl.constexpr = DP != D
        q = load_tile(Q + b64 * q_b + h64 * q_h, rows, row_ok, dims, q_n, q_d, True, PAD_D, D)
        kbase, vbase = K + b64 * k_b + hk * k_h, V + b64 * v_b + hk * v_h
        peak = tl.full([BM], -float("inf"), tl.float32)
        mass = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DP], tl.float32)
        if HAS_INIT:
            before = tl.load(InitLse + (b64 * H + h64) * N + rows, mask=row_ok, other=-float("inf"))
            seen = before > -float("inf")
            peak = before * LOG2E
            mass = tl.where(seen, 1.0, 0.0)
            acc = load_tile(InitOut + b64 * io_b + h64 * io_h, rows, row_ok & seen, dims, io_n, io_d, True, PAD_D, D).to(tl.float32)

        listing = Index + b64 * i_b + h64 * i_h + r.to(tl.int64) * K_WIDTH
        starts, lengths = KvStart + b * ks_b + h * ks_h, KvLen + b * kl_b + h * kl_h
        n_full = tl.load(NFull + b * f_b + h * f_h + r)
        if HAS_DENSE:
            dense = tl.load(Dense + r)
            n_full = tl.where(dense != 0, C, n_full)
        ksub = KSUB if KSUB > 0 else ksub_any

        PLAIN: tl.constexpr = EVEN and POSITIVE and not HAS_BLOCK_BIAS and not HAS_KEY_BIAS
        for it in tl.range(0, n_full * ksub, num_stages=STAGES):
            slot = it // ksub
            if HAS_DENSE:
                c = tl.load(listing + slot, mask=dense == 0, other=0)
                c = tl.where(dense != 0, slot, c)
            else:
                c = tl.load(listing + slot)
            offs = (it % ksub) * BN + tl.arange(0, BN)
            if UNIFORM:
                first = c * (ksub * BN)
            else:
                first = tl.load(starts + c)
            key_ok = offs >= 0
            if not EVEN:
                key_ok = offs < tl.load(lengths + c)
            first64 = first.to(tl.int64)
            k = load_tile(kbase + first64 * k_n, offs, key_ok, dims, k_n, k_d, not EVEN, PAD_D, D)
            v = load_tile(vbase + first64 * v_n, offs, key_ok, dims, v_n, v_d, not EVEN, PAD_D, D)
            qk = tl.dot(q, tl.trans(k), input_precision="ieee")
            if PLAIN:
                acc, peak, mass = absorb_plain(acc, peak, mass, qk, v, scale)
            else:
                s = qk * scale
                if HAS_BLOCK_BIAS:
                    s += tl.load(BlockBias + b64 * bb_b + h64 * bb_h + r.to(tl.int64) * bb_r + c) * LOG2E
                if HAS_KEY_BIAS:
                    s += tl.load(KeyBias + b64 * kb_b + h64 * kb_h + first + offs, mask=key_ok, other=0.0)[None, :] * LOG2E
                if not EVEN:
                    s = tl.where(key_ok[None, :], s, -float("inf"))
                acc, peak, mass = absorb(acc, peak, mass, s, v)

        if HAS_PARTIAL:
            n_all = tl.load(Count + b * c_b + h * c_h + r)
            if HAS_DENSE:
                n_all = tl.where(dense != 0, n_full, n_all)
            for it in tl.range(n_full * ksub, n_all * ksub, num_stages=STAGES):
                c = tl.load(listing + it // ksub)
                offs = (it % ksub) * BN + tl.arange(0, BN)
                first = tl.load(starts + c)
                key_ok = offs < tl.load(lengths + c)
                first64 = first.to(tl.int64)
                k = load_tile(kbase + first64 * k_n, offs, key_ok, dims, k_n, k_d, True, PAD_D, D)
                v = load_tile(vbase + first64 * v_n, offs, key_ok, dims, v_n, v_d, True, PAD_D, D)
                s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                if HAS_BLOCK_BIAS:
                    s += tl.load(BlockBias + b64 * bb_b + h64 * bb_h + r.to(tl.int64) * bb_r + c) * LOG2E
                if HAS_KEY_BIAS:
                    s += tl.load(KeyBias + b64 * kb_b + h64 * kb_h + first + offs, mask=key_ok, other=0.0)[None, :] * LOG2E
                ok = key_ok[None, :] & row_ok[:, None]
                for a in tl.static_range(AXES):
                    low = tl.load(Low + a * PQ + pos, mask=local < length, other=0)
                    high = tl.load(High + a * PQ + pos, mask=local < length, other=0)
                    coord = tl.load(Coord + a * PK + first + offs, mask=key_ok, other=0)
                    ok = ok & (low[:, None] <= coord[None, :]) & (coord[None, :] < high[:, None])
                if HAS_BITS:
                    word = tl.load(RowBits + b64 * rb_b + h64 * rb_h + pos.to(tl.int64) * WORDS + c // 32, mask=local < length, other=0)
                    ok = ok & (((word >> (c % 32)) & 1) != 0)[:, None]
                s = tl.where(ok, s, -float("inf"))
                acc, peak, mass = absorb(acc, peak, mass, s, v)

        if HAS_PROXIES:
            words = Listed + b64 * li_b + h64 * li_h + r.to(tl.int64) * ((C + 31) // 32)
            counts = ProxyN + b64 * pn_b + h64 * pn_h
            for begin in tl.range(0, C, BN, num_stages=1):
                c = begin + tl.arange(0, BN)
                inside = c < C
                pk = load_tile(ProxyK + b64 * p_b + hk * p_h, c, inside, dims, p_c, 1, True, PAD_D, D)
                pv = load_tile(ProxyV + b64 * pv_b + hk * pv_h, c, inside, dims, pv_c, 1, True, PAD_D, D)
                s = tl.dot(q, tl.trans(pk), input_precision="ieee") * scale
                if HAS_VAR:
                    var = load_tile(ProxyVar + b64 * var_b + hk * var_h, c, inside, dims, var_c, 1, True, PAD_D, D)
                    square = q.to(tl.float32) * q.to(tl.float32)
                    # scale is in log2 units; scale^2 / 2 of the natural score is scale^2 / 2 * LN2 of this one
                    s += tl.dot(square.to(q.dtype), tl.trans(var.to(q.dtype)), input_precision="ieee") * (0.5 * scale * scale * LN2)
                n = tl.load(counts + c, mask=inside, other=0.0)
                s += tl.log2(n)[None, :]
                if HAS_BLOCK_BIAS:
                    s += tl.load(BlockBias + b64 * bb_b + h64 * bb_h + r.to(tl.int64) * bb_r + c, mask=inside, other=0.0)[None, :] * LOG2E
                hidden = (tl.load(words + c // 32, mask=inside, other=-1) >> (c % 32)) & 1
                s = tl.where((inside & (n > 0) & (hidden == 0))[None, :], s, -float("inf"))
                acc, peak, mass = absorb(acc, peak, mass, s, pv)

        out = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        at = Out + b64 * o_b + h64 * o_h + rows[:, None] * o_n + dims[None, :] * o_d
        if PAD_D:
            tl.store(at, out.to(Out.dtype.element_ty), mask=row_ok[:, None] & (dims < D)[None, :])
        else:
            tl.store(at, out.to(Out.dtype.element_ty), mask=row_ok[:, None])
        if NEED_LSE:
            lse = tl.where(mass == 0.0, -float("inf"), peak * LN2 + tl.log(mass))
            tl.store(Lse + (b64 * H + h64) * N + rows, lse, mask=row_ok)
