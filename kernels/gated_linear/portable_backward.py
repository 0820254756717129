"""The Triton kernel of the gradients of queries, keys, values and gates of gated linear attention. Letters as in portable.py.

* One program per chunk, head and tile of key channels; what sums over key channels (values, a gate for a whole head) is summed afterwards
  where there are several tiles.
* From the chunk's centre, states and their gradients meet the same factors as pairs do: everything about a token is one accumulator times
  one factor.
* A gate's gradient is the sum of q dq - k dk from its token to the chunk's end, plus what the leaving state and its gradient give. Both
  shares come from the same rounded factors, so pairs that do not hold the gate cancel to fp32.
* Sums along the chunk are ``cumsum``, not products with a triangular matrix, which some versions of the compiler get wrong on
  Hopper (gated scalar backward, Triton 3.4 to 3.7.0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.gated_linear.portable import UNSPECIALISED
from foveal.kernels.gated_linear.portable_steps import step_gradients
from foveal.kernels.gated_linear.spans import (
    centre_of,
    in_order,
    limit_of,
    load_state,
    load_tile,
    pair_decays,
    running_sum,
    spans,
)


@triton.jit
def factors(q, k, gates, rows, ok, dims, g_n, g_d, DK: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr):
    """-> factors of queries and keys [C, BK or 1], upto, whole (see portable.py)"""
    upto, whole = spans(gates, rows, ok, dims, g_n, g_d, DK, VECTOR, LEFT)
    centre = centre_of(whole)
    return tl.exp2(upto - centre), tl.exp2(whole - upto - centre), upto, whole


@triton.jit
def weights(
    q, k, gates, rows, ok, dims, g_n, g_d, DK: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr, MIXED: tl.constexpr
):  # fmt: skip
    """-> one direction's weights of pairs, or their decays [C, C]; q and k times their factors; the lowest log2 decay across the chunk"""
    KIND: tl.constexpr = tl.bfloat16 if q.dtype == tl.bfloat16 else tl.float32
    query, key, upto, whole = factors(q, k, gates, rows, ok, dims, g_n, g_d, DK, VECTOR, LEFT)
    qx, kx = (q * query).to(KIND), (k * key).to(KIND)
    if VECTOR:
        a = tl.where(in_order(rows, LEFT), tl.dot(qx, tl.trans(kx), input_precision=MIXED), 0.0)
    else:
        a = pair_decays(upto, rows, LEFT)
    return a, qx, kx, tl.min(whole, 0)


@triton.jit
def one_direction(
    q, k, qx, kx, gates, V, DO, States, Grads, at, da, z, rows, ok, dims, v_n, v_d, do_n, do_d, g_n, g_d, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr,
    HAS_STATES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """-> dq, dk (with one gate a head: only what states give), the gates' gradient. z: what pairs give it, with one gate a head"""
    KIND: tl.constexpr = tl.bfloat16 if q.dtype == tl.bfloat16 else tl.float32
    dqx, dkx = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    if HAS_STATES:
        for part in tl.range(0, DV, BV, num_stages=1):
            wide = part + tl.arange(0, BV)
            s, ds = load_state(States, at, dims, wide, DK, DV), load_state(Grads, at, dims, wide, DK, DV)
            do = load_tile(DO, rows, ok, wide, do_n, do_d, DV).to(KIND)
            v = load_tile(V, rows, ok, wide, v_n, v_d, DV).to(KIND)
            through += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
            dqx = tl.dot(do, tl.trans(s), dqx, input_precision=MIXED)
            dkx = tl.dot(v, tl.trans(ds), dkx, input_precision=MIXED)
        dqx *= scale
    # Gates are read again: their factors would fill the registers meanwhile.
    query, key, _upto, whole = factors(q, k, gates, rows, ok, dims, g_n, g_d, DK, VECTOR, LEFT)
    through = through * tl.exp2(whole - 2 * centre_of(whole)) + tl.sum(kx * dkx, 0)
    if VECTOR:
        d = tl.where(in_order(rows, LEFT), da, tl.zeros_like(da))
        dqx = tl.dot(d, kx, dqx, input_precision=MIXED)
        dkx = tl.dot(tl.trans(d), qx, dkx, input_precision=MIXED)
        dg = running_sum(qx * dqx - kx * dkx, LEFT) + through[None, :]
        return dqx * query, dkx * key, dg
    else:
        dq, dk = dqx * query, dkx * key
        z += tl.sum(q * dq - k * dk, 1)[:, None]
        return dq, dk, running_sum(z, LEFT) + tl.sum(through, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_gradients(
    Q, K, V, DO, GF, GB, States, Grads, DQ, DK_, DV_, DGF, DGB,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_h, do_n, do_d, gf_b, gf_h, gf_n, gf_d, gb_b, gb_h, gb_n, gb_d,
    dq_b, dq_h, dq_n, dq_d, dk_b, dk_h, dk_n, dk_d, dv_t, dv_b, dv_h, dv_n, dv_d, dgf_t, dgf_b, dgf_h, dgf_n, dgf_d, dgb_t, dgb_b, dgb_h, dgb_n, dgb_d,
    scale, H, N, M, heads,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KTILES: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, HAS_STATES: tl.constexpr, PRODUCT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """States [directions, B H, M, K, V] entering each chunk and Grads of those leaving it, both seen from its centre.

    DV [tiles, B, H, N, V] and, with one gate a head, DGF and DGB [tiles, B, H, N, 1]: a share for every tile of key channels.
    """
    tile, at = tl.program_id(0) % KTILES, tl.program_id(0) // KTILES
    h, m, b = at % H, at // H % M, at // (H * M)
    forward = (b * H + h) * M + m
    backward = forward + (heads * M if FORWARD else 0)
    first, b, h, tile = m.to(tl.int64) * C, b.to(tl.int64), h.to(tl.int64), tile.to(tl.int64)
    Q += b * q_b + h * q_h + first * q_n
    K += b * k_b + h * k_h + first * k_n
    V += b * v_b + h * v_h + first * v_n
    DO += b * do_b + h * do_h + first * do_n
    GF += b * gf_b + h * gf_h + first * gf_n
    GB += b * gb_b + h * gb_h + first * gb_n
    DQ += b * dq_b + h * dq_h + first * dq_n
    DK_ += b * dk_b + h * dk_h + first * dk_n
    DV_ += tile * dv_t + b * dv_b + h * dv_h + first * dv_n
    DGF += tile * dgf_t + b * dgf_b + h * dgf_h + first * dgf_n
    DGB += tile * dgb_t + b * dgb_b + h * dgb_h + first * dgb_n
    INPUT: tl.constexpr = Q.dtype.element_ty
    KIND: tl.constexpr = tl.bfloat16 if Q.dtype.element_ty == tl.bfloat16 else tl.float32
    dims = tile.to(tl.int32) * BK + tl.arange(0, BK)
    rows = tl.arange(0, C)
    count = tl.minimum(C, N - m * C)
    ok = rows < count
    q = load_tile(Q, rows, ok, dims, q_n, q_d, DK)
    k = load_tile(K, rows, ok, dims, k_n, k_d, DK)
    a, lowest = tl.zeros([C, C], tl.float32), 0.0
    if FORWARD:
        part, qf, kf, low = weights(q, k, GF, rows, ok, dims, gf_n, gf_d, DK, VECTOR, True, MIXED)
        a, lowest = a + part, tl.minimum(lowest, low)
    if BACKWARD:
        part, qb, kb, low = weights(q, k, GB, rows, ok, dims, gb_n, gb_d, DK, VECTOR, False, MIXED)
        a, lowest = a + part, tl.minimum(lowest, low)
    seen = ok & (lowest + tl.zeros([C], tl.float32) > limit_of(INPUT, VECTOR))
    da = tl.zeros([C, C], tl.float32)
    for start in tl.range(0, DV, BV, num_stages=1):
        wide = start + tl.arange(0, BV)
        do = load_tile(DO, rows, ok, wide, do_n, do_d, DV)
        da = tl.dot(do, tl.trans(load_tile(V, rows, ok, wide, v_n, v_d, DV)), da, input_precision=PRODUCT)
    da *= scale
    dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    zf, zb = tl.zeros([C, 1], tl.float32), tl.zeros([C, 1], tl.float32)
    if not VECTOR:
        qk = tl.dot(q, tl.trans(k), input_precision=PRODUCT)
        d = (da * a).to(INPUT)
        dq, dk = tl.dot(d, k, input_precision=PRODUCT), tl.dot(tl.trans(d), q, input_precision=PRODUCT)
        share = d.to(tl.float32) * qk
        below, above = (
            tl.where(rows[:, None] > rows[None, :], share, 0.0),
            tl.where(rows[:, None] < rows[None, :], share, 0.0),
        )
        zf = tl.sum(below, 1)[:, None] - tl.sum(below, 0)[:, None]
        zb = tl.sum(above, 1)[:, None] - tl.sum(above, 0)[:, None]
        a *= qk
    a = tl.trans((a * scale).to(INPUT))
    for start in tl.range(0, DV, BV, num_stages=1):
        wide = start + tl.arange(0, BV)
        dv = tl.dot(a, load_tile(DO, rows, ok, wide, do_n, do_d, DV), input_precision=PRODUCT)
        if HAS_STATES:
            if FORWARD:
                dv = tl.dot(kf, load_state(Grads, forward, dims, wide, DK, DV), dv, input_precision=MIXED)
            if BACKWARD:
                dv = tl.dot(kb, load_state(Grads, backward, dims, wide, DK, DV), dv, input_precision=MIXED)
        place = DV_ + rows[:, None] * dv_n + wide[None, :] * dv_d
        tl.store(place, dv.to(DV_.dtype.element_ty), mask=seen[:, None] & (wide < DV)[None, :])
    da = da.to(KIND)
    G: tl.constexpr = BK if VECTOR else 1
    dgf, dgb = tl.zeros([C, G], tl.float32), tl.zeros([C, G], tl.float32)
    if FORWARD:
        more_q, more_k, dgf = one_direction(
            q, k, qf, kf, GF, V, DO, States, Grads, forward, da, zf, rows, ok, dims, v_n, v_d, do_n, do_d, gf_n, gf_d, scale,
            DK, DV, BK, BV, C, VECTOR, True, HAS_STATES, MIXED,
        )  # fmt: skip
        dq, dk = dq + more_q, dk + more_k
    if BACKWARD:
        more_q, more_k, dgb = one_direction(
            q, k, qb, kb, GB, V, DO, States, Grads, backward, da, zb, rows, ok, dims, v_n, v_d, do_n, do_d, gb_n, gb_d, scale,
            DK, DV, BK, BV, C, VECTOR, False, HAS_STATES, MIXED,
        )  # fmt: skip
        dq, dk = dq + more_q, dk + more_k
    if lowest <= limit_of(INPUT, VECTOR):
        dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        each_f, each_b = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        edge_f, edge_b = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
        for begin in tl.range(0, DV, BV, num_stages=1):
            channels = begin + tl.arange(0, BV)
            dv_steps = tl.zeros([C, BV], tl.float32)
            if FORWARD:
                dq, dk, dv_steps, each_f, edge = step_gradients(
                    Q, K, V, DO, GF, States, Grads, forward, dq, dk, dv_steps, each_f, rows, ok, count, dims, channels,
                    q_n, q_d, k_n, k_d, v_n, v_d, do_n, do_d, gf_n, gf_d, scale, DK, DV, BK, BV, VECTOR, True, HAS_STATES,
                )  # fmt: skip
                edge_f += edge
            if BACKWARD:
                dq, dk, dv_steps, each_b, edge = step_gradients(
                    Q, K, V, DO, GB, States, Grads, backward, dq, dk, dv_steps, each_b, rows, ok, count, dims, channels,
                    q_n, q_d, k_n, k_d, v_n, v_d, do_n, do_d, gb_n, gb_d, scale, DK, DV, BK, BV, VECTOR, False, HAS_STATES,
                )  # fmt: skip
                edge_b += edge
            at_v = DV_ + rows[:, None] * dv_n + channels[None, :] * dv_d
            tl.store(at_v, dv_steps.to(DV_.dtype.element_ty), mask=ok[:, None] & (channels < DV)[None, :])
        dgf, dgb = gate_sums(each_f, edge_f, VECTOR, True), gate_sums(each_b, edge_b, VECTOR, False)
    inside = ok[:, None] & (dims < DK)[None, :]
    tl.store(DQ + rows[:, None] * dq_n + dims[None, :] * dq_d, dq.to(INPUT), mask=inside)
    tl.store(DK_ + rows[:, None] * dk_n + dims[None, :] * dk_d, dk.to(INPUT), mask=inside)
    channels = dims if VECTOR else tl.arange(0, 1)
    inside = ok[:, None] & (channels < DK)[None, :]
    if FORWARD:
        place = DGF + rows[:, None] * dgf_n + channels[None, :] * dgf_d
        tl.store(place, dgf.to(DGF.dtype.element_ty), mask=inside)
    if BACKWARD:
        place = DGB + rows[:, None] * dgb_n + channels[None, :] * dgb_d
        tl.store(place, dgb.to(DGB.dtype.element_ty), mask=inside)


@triton.jit
def gate_sums(each, edge, VECTOR: tl.constexpr, LEFT: tl.constexpr):
    """q dq - k dk of tokens, and the chunk's end -> the gates' gradient [C, BK or 1]"""
    if VECTOR:
        return running_sum(each, LEFT) + edge[None, :]
    else:
        return running_sum(tl.sum(each, 1)[:, None], LEFT) + tl.sum(edge, 0)
