"""The Triton kernel of the gradients of queries, keys and gates of gated linear attention. Letters as in portable.py.

* One program per chunk, head and tile of key channels: with a gate per channel nothing here sums over channels.
* A gate's gradient is a sum over the pairs whose run of tokens holds it. Pairs of one chunk: (query's share - key's share) summed
  from the token on; both shares come from the same rounded factors, so pairs that do not hold the gate cancel to fp32. Pairs across
  chunks are summed from their own side, so that nothing has to cancel.
* Sums along the chunk are ``cumsum``, not products with a triangular matrix, which some versions of the compiler get wrong on
  Hopper (gated scalar backward, Triton 3.4 to 3.7.0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.gated_linear.portable import (
    UNSPECIALISED,
    apart,
    both_sums,
    doubled,
    factors,
    load_state,
    load_tile,
    pair_decays,
    running_sum,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_gradients(
    Q, K, V, DO, GF, GB, States, Grads, DQ, DK_, DGF, DGB,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_h, do_n, do_d, gf_b, gf_h, gf_n, gf_d, gb_b, gb_h, gb_n, gb_d,
    dq_b, dq_h, dq_n, dq_d, dk_b, dk_h, dk_n, dk_d,
    scale, H, N, M, lead,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KTILES: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    VECTOR: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, HAS_STATES: tl.constexpr, PRODUCT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """States [directions, B H, M, K, V] entering each chunk, Grads those of the states leaving it, both fp32.

    DGF, DGB [B, H, N, K], or [tiles, B, H, N] with one gate a head, fp32.
    """
    tile = tl.program_id(0) % KTILES
    at = tl.program_id(0) // KTILES
    m, bh = at % M, at // M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    first = m.to(tl.int64) * C
    rows = tl.arange(0, C)
    ok = rows < N - m * C
    dims = tile * BK + tl.arange(0, BK)
    values, grads = V + b * v_b + h * v_h + first * v_n, DO + b * do_b + h * do_h + first * do_n
    da = tl.zeros([C, C], tl.float32)
    self_grad = tl.zeros([C], tl.float32)
    for part in tl.range(0, DV, BV, num_stages=1):
        wide = part + tl.arange(0, BV)
        v = load_tile(values, rows, ok, wide, v_n, v_d, DV)
        do = load_tile(grads, rows, ok, wide, do_n, do_d, DV)
        da = tl.dot(do, tl.trans(v), da, input_precision=PRODUCT)
        self_grad += tl.sum(do.to(tl.float32) * v.to(tl.float32), 1)
    da = da * scale
    q = load_tile(Q + b * q_b + h * q_h + first * q_n, rows, ok, dims, q_n, q_d, DK)
    k = load_tile(K + b * k_b + h * k_h + first * k_n, rows, ok, dims, k_n, k_d, DK)
    fu, fa, bu, ba = both_sums(
        GF + b * gf_b + h * gf_h + first * gf_n, GB + b * gb_b + h * gb_h + first * gb_n, rows, ok, dims,
        gf_n, gf_d, gb_n, gb_d, DK, VECTOR, FORWARD, BACKWARD,
    )  # fmt: skip
    if VECTOR:
        own: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
        dq = self_grad[:, None] * (scale * own) * k
        dk = self_grad[:, None] * (scale * own) * q
        zf, zb = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for level in tl.range(0, LEVELS, num_stages=1):
            query, key = factors(fu, fa, bu, ba, rows, level, FORWARD, BACKWARD)
            qx, kx = (q * query).to(q.dtype), (k * key).to(k.dtype)
            d = tl.where(apart(rows, level, FORWARD, BACKWARD), da, 0.0).to(q.dtype)
            dqx = tl.dot(d, kx, input_precision=PRODUCT)
            dkx = tl.dot(tl.trans(d), qx, input_precision=PRODUCT)
            dq += query * dqx
            dk += key * dkx
            zq, zk = qx * dqx, kx * dkx
            if FORWARD and BACKWARD:
                right = (((rows >> level) & 1) != 0)[:, None]
                zf += tl.where(right, zq, -zk)
                zb += tl.where(right, -zk, zq)
            elif FORWARD:
                zf += zq - zk
            else:
                zb += zq - zk
            if FORWARD:
                fu, fa = doubled(fu, fa, rows, level)
            if BACKWARD:
                bu, ba = doubled(bu, ba, rows, level)
    else:
        decay, fu, fa, bu, ba = pair_decays(fu, fa, bu, ba, rows, C, LEVELS, FORWARD, BACKWARD)
        d = (da * decay).to(q.dtype)
        dq = tl.dot(d, k, input_precision=PRODUCT)
        dk = tl.dot(tl.trans(d), q, input_precision=PRODUCT)
        share = d.to(tl.float32) * tl.dot(q, tl.trans(k), input_precision=PRODUCT)
        query, key = rows[:, None], rows[None, :]
        below, above = tl.where(query > key, share, 0.0), tl.where(query < key, share, 0.0)
        zf = tl.sum(below, 1)[:, None] - tl.sum(below, 0)[:, None]
        zb = tl.sum(above, 1)[:, None] - tl.sum(above, 0)[:, None]
    GW: tl.constexpr = BK if VECTOR else 1
    if FORWARD:
        dg = tl.zeros([C, GW], tl.float32)
        if HAS_STATES:
            dq, dk, zq, dg = across(
                q, k, dq, dk, fu, fa, values, v_n, v_d, grads, do_n, do_d, States, Grads, at, rows, ok, dims, scale,
                DK, DV, BK, BV, C, VECTOR, False, MIXED,
            )  # fmt: skip
            zf += zq
        dg += running_sum(zf, True)
        store_gate(DGF, dg, bh, first, rows, ok, dims, tile, N, lead // M, DK, VECTOR)
    if BACKWARD:
        dg = tl.zeros([C, GW], tl.float32)
        if HAS_STATES:
            to = tl.where(FORWARD, lead, 0) + at
            dq, dk, zq, dg = across(
                q, k, dq, dk, ba, bu, values, v_n, v_d, grads, do_n, do_d, States, Grads, to, rows, ok, dims, scale,
                DK, DV, BK, BV, C, VECTOR, True, MIXED,
            )  # fmt: skip
            zb += zq
        dg += running_sum(zb, False)
        store_gate(DGB, dg, bh, first, rows, ok, dims, tile, N, lead // M, DK, VECTOR)
    inside = ok[:, None] & (dims < DK)[None, :]
    tl.store(
        DQ + b * dq_b + h * dq_h + first * dq_n + rows[:, None] * dq_n + dims[None, :] * dq_d,
        dq.to(DQ.dtype.element_ty),
        mask=inside,
    )
    tl.store(
        DK_ + b * dk_b + h * dk_h + first * dk_n + rows[:, None] * dk_n + dims[None, :] * dk_d,
        dk.to(DK_.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def across(
    q, k, dq, dk, q_span, k_span, values, v_n, v_d, grads, do_n, do_d, States, Grads, at, rows, ok, dims, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Adds what crosses the chunk's borders. q_span: sums from the incoming state to each query, k_span from each key onwards.

    -> dq, dk, query's share of the gates' gradient (still to be summed along the chunk), key's share (summed).
    """
    mixed = tl.bfloat16 if q.dtype == tl.bfloat16 else tl.float32
    far_q, far_k = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    for part in tl.range(0, DV, BV, num_stages=1):
        wide = part + tl.arange(0, BV)
        s, ds = load_state(States, at, dims, wide, DK, DV), load_state(Grads, at, dims, wide, DK, DV)
        do = load_tile(grads, rows, ok, wide, do_n, do_d, DV)
        v = load_tile(values, rows, ok, wide, v_n, v_d, DV)
        far_q = tl.dot(do.to(mixed), tl.trans(s.to(mixed)), far_q, input_precision=MIXED)
        far_k = tl.dot(v.to(mixed), tl.trans(ds.to(mixed)), far_k, input_precision=MIXED)
        through += tl.sum(s * ds, 1)
    far_q *= tl.exp2(q_span) * scale
    far_k *= tl.exp2(k_span)
    zq, zk = q * far_q, k * far_k
    # The whole chunk's decay: what both spans of any one token make up.
    whole = tl.sum(tl.where((rows == 0)[:, None], q_span + k_span, 0.0), 0)
    if VECTOR:
        through = (through * tl.exp2(whole))[None, :]
    else:
        zq, zk = tl.sum(zq, 1)[:, None], tl.sum(zk, 1)[:, None]
        through = (tl.sum(through, 0) * tl.exp2(whole))[None, :]
    return dq + far_q, dk + far_k, zq, running_sum(zk, REVERSE) - zk + through


@triton.jit
def store_gate(DG, dg, bh, first, rows, ok, dims, tile, N, heads, DK: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR:
        place = DG + (bh.to(tl.int64) * N + first) * DK + rows[:, None] * DK + dims[None, :]
        tl.store(place, dg, mask=ok[:, None] & (dims < DK)[None, :])
    else:
        place = DG + ((tile * heads + bh).to(tl.int64) * N + first) + rows[:, None]
        tl.store(place, dg, mask=ok[:, None])
