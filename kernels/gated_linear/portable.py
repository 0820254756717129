"""The Triton kernels of gated linear attention: the states that enter the chunks, and the outputs of a chunk.

Letters: B batch, H heads, N tokens, K key width, V value width, C tokens of a chunk, M chunks, BK key channels and BV value channels
of a tile. Gates are in log2 units inside.

* A chunk is seen from its centre. Per channel, ``whole`` is the log2 decay across the chunk and ``upto`` that from the state which
  enters to a token; queries take 2^(upto - whole/2), keys the inverse. Then one product holds every pair's weight, the factors of both
  reach half the chunk's decay either way, and the state as seen from the centre meets the same rounded queries. Pairs in the wrong
  order come out huge; a mask drops them.
* That is exact while no channel of the chunk decays by more than 2^LIMIT: over 64 tokens with x about 0, gates of sigmoid(x)^(1/16) decay
  by some 2^-5, of sigmoid(x) by 2^-75. Any other chunk is read one token after the other (portable_steps.py): slower, and right for every gate, -inf included.
* Both directions share q, k, v: each fills one triangle of the weights, and the diagonal twice.
* With one gate a head, the product of queries and keys is multiplied by decays that are differences of sums.
* What the state hands on is summed, never subtracted, so a huge gate does not blur those beside it.
* Gates, sums, states and accumulators are fp32. Products with factors and states take bf16 for bf16 inputs, else fp32 (as three tf32 products
  each), because fp16 would overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.gated_linear.portable_steps import step_outputs
from foveal.kernels.gated_linear.spans import (
    centre_of,
    in_order,
    limit_of,
    load_gate,
    load_state,
    load_tile,
    pair_decays,
    running_sum,
    spans,
)

UNSPECIALISED = ("H", "N", "M", "heads", "scale")


@triton.jit
def sweep(
    X, Y, G, First, States, Last, x_n, x_d, y_n, y_d, g_n, g_d, scale, N, M, at, dims, wide,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr,
    QUERY: tl.constexpr, HAS_FIRST: tl.constexpr, NEED_LAST: tl.constexpr, MIXED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One direction of one head, chunk after chunk; at: its number. The state is kept before each chunk, as seen from that chunk's centre."""
    KIND: tl.constexpr = tl.bfloat16 if X.dtype.element_ty == tl.bfloat16 else tl.float32
    rows = tl.arange(0, C)
    inside = (dims < DK)[:, None] & (wide < DV)[None, :]
    offset = dims[:, None] * DV + wide[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_FIRST:
        state = tl.load(First + at * (DK * DV) + offset, mask=inside, other=0.0)
    for step in tl.range(0, M, num_stages=STAGES, disable_licm=True):
        m = step if LEFT != QUERY else M - 1 - step
        first = m.to(tl.int64) * C
        count = tl.minimum(C, N - m * C)
        gates = G + first * g_n
        x = load_tile(X + first * x_n, rows, rows < count, dims, x_n, x_d, DK)
        y = load_tile(Y + first * y_n, rows, rows < count, wide, y_n, y_d, DV)
        if QUERY:
            span, whole = spans(gates, rows, rows < count, dims, g_n, g_d, DK, VECTOR, LEFT)
        else:  # from each token to the state: the gates beside it, towards the end of the chunk, and the one that is beside none
            beside = rows + (1 if LEFT else -1)
            gate = load_gate(
                gates, beside, (rows < count) & (beside >= 0) & (beside < count), dims, g_n, g_d, DK, VECTOR
            )
            span = running_sum(gate, LEFT)
            edge = tl.zeros([1], tl.int32) + (0 if LEFT else count - 1)
            whole = tl.sum(gate, 0) + tl.sum(load_gate(gates, edge, edge >= 0, dims, g_n, g_d, DK, VECTOR), 0)
        kept = state * tl.exp2(centre_of(whole))[:, None]
        tl.store(States + (at * M + m) * (DK * DV) + offset, kept.to(States.dtype.element_ty), mask=inside)
        x = (x * (tl.exp2(span) * scale)).to(KIND)
        state = tl.dot(tl.trans(x), y.to(KIND), state * tl.exp2(whole)[:, None], input_precision=MIXED)
    if NEED_LAST:
        tl.store(Last + at * (DK * DV) + offset, state, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_states(
    X, Y, GF, GB, First, States, Last,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, gf_b, gf_h, gf_n, gf_d, gb_b, gb_h, gb_n, gb_d,
    scale, H, N, M, heads,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KTILES: tl.constexpr, VTILES: tl.constexpr, C: tl.constexpr,
    VECTOR: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, QUERY: tl.constexpr, HAS_FIRST: tl.constexpr,
    NEED_LAST: tl.constexpr, MIXED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States [directions, B H, M, K, V] that enter each chunk, seen from its centre; ``state <- decay state + (x * decay)^T y``.

    x are keys and y values; or (QUERY) x are queries and y the output's gradient, for the states' gradients, which run the other way.
    First and Last [B H, K, V] fp32 belong to the first direction. heads: B H. One program per direction, head and tile of the state.
    """
    part, at = tl.program_id(0) % (KTILES * VTILES), tl.program_id(0) // (KTILES * VTILES)
    dims, wide = part // VTILES * BK + tl.arange(0, BK), part % VTILES * BV + tl.arange(0, BV)
    bh = at % heads
    b, h, at = (bh // H).to(tl.int64), (bh % H).to(tl.int64), at.to(tl.int64)
    X += b * x_b + h * x_h
    Y += b * y_b + h * y_h
    if FORWARD and at < heads:
        sweep(
            X, Y, GF + b * gf_b + h * gf_h, First, States, Last, x_n, x_d, y_n, y_d, gf_n, gf_d, scale, N, M, at, dims, wide,
            DK, DV, BK, BV, C, VECTOR, True, QUERY, HAS_FIRST, NEED_LAST, MIXED, STAGES,
        )  # fmt: skip
    if BACKWARD and (at >= heads or not FORWARD):
        sweep(
            X, Y, GB + b * gb_b + h * gb_h, First, States, Last, x_n, x_d, y_n, y_d, gb_n, gb_d, scale, N, M, at, dims, wide,
            DK, DV, BK, BV, C, VECTOR, False, QUERY, HAS_FIRST and not FORWARD, NEED_LAST and not FORWARD, MIXED, STAGES,
        )  # fmt: skip


@triton.jit
def see(
    q, k, gates, States, at, a, out, rows, ok, dims, wide, g_n, g_d,
    DK: tl.constexpr, DV: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr, HAS_STATES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Adds to a the weights of one direction's pairs (of these key channels), or their decays, and to out what the state gives.

    -> a, out, log2 decay across the chunk of the channel that decays most
    """
    KIND: tl.constexpr = tl.bfloat16 if q.dtype == tl.bfloat16 else tl.float32
    upto, whole = spans(gates, rows, ok, dims, g_n, g_d, DK, VECTOR, LEFT)
    query = tl.exp2(upto - centre_of(whole))
    if VECTOR:
        x = (q * query).to(KIND)
        key = (k * tl.exp2(whole - upto - centre_of(whole))).to(KIND)
        a += tl.where(in_order(rows, LEFT), tl.dot(x, tl.trans(key), input_precision=MIXED), 0.0)
    else:
        a += pair_decays(upto, rows, LEFT)
    if HAS_STATES:
        s = load_state(States, at, dims, wide, DK, DV)
        if VECTOR:
            out = tl.dot(x, s, out, input_precision=MIXED)
        else:
            out += tl.dot(q.to(KIND), s, input_precision=MIXED) * query
    return a, out, tl.min(whole, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_outputs(
    Q, K, Y, GF, GB, States, Out,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, y_b, y_h, y_n, y_d, gf_b, gf_h, gf_n, gf_d, gb_b, gb_h, gb_n, gb_d, o_b, o_h, o_n, o_d,
    scale, H, N, M, heads,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KTILES: tl.constexpr, VTILES: tl.constexpr, C: tl.constexpr,
    VECTOR: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, HAS_STATES: tl.constexpr, PRODUCT: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """out = scale (A y + queries from the chunk's centre x states seen from there). One program per chunk, head and tile of values."""
    wide = tl.program_id(0) % VTILES * BV + tl.arange(0, BV)
    at = tl.program_id(0) // VTILES  # heads beside each other: their rows may be too
    h, m, b = at % H, at // H % M, at // (H * M)
    forward = (b * H + h) * M + m  # number of the state from the left
    backward = forward + (heads * M if FORWARD else 0)
    first, b, h = m.to(tl.int64) * C, b.to(tl.int64), h.to(tl.int64)
    Q += b * q_b + h * q_h + first * q_n
    K += b * k_b + h * k_h + first * k_n
    Y += b * y_b + h * y_h + first * y_n
    GF += b * gf_b + h * gf_h + first * gf_n
    GB += b * gb_b + h * gb_h + first * gb_n
    rows = tl.arange(0, C)
    count = tl.minimum(C, N - m * C)
    ok = rows < count
    out = tl.zeros([C, BV], tl.float32)
    a = tl.zeros([C, C], tl.float32)
    decay = tl.zeros([C, C], tl.float32)
    lowest = 0.0
    for tile in tl.static_range(KTILES):
        dims = tile * BK + tl.arange(0, BK)
        q = load_tile(Q, rows, ok, dims, q_n, q_d, DK)
        k = load_tile(K, rows, ok, dims, k_n, k_d, DK)
        part = a
        if not VECTOR:
            a = tl.dot(q, tl.trans(k), a, input_precision=PRODUCT)
            part = tl.zeros([C, C], tl.float32)
        if FORWARD:
            part, out, low = see(
                q, k, GF, States, forward, part, out, rows, ok, dims, wide, gf_n, gf_d, DK, DV, VECTOR, True, HAS_STATES, MIXED
            )  # fmt: skip
            lowest = tl.minimum(lowest, low)
        if BACKWARD:
            part, out, low = see(
                q, k, GB, States, backward, part, out, rows, ok, dims, wide, gb_n, gb_d, DK, DV, VECTOR, False, HAS_STATES, MIXED
            )  # fmt: skip
            lowest = tl.minimum(lowest, low)
        if VECTOR:
            a = part
        else:
            decay = part
    if not VECTOR:
        a *= decay
    y = load_tile(Y, rows, ok, wide, y_n, y_d, DV)
    out = tl.dot(a.to(y.dtype), y, out, input_precision=PRODUCT)
    if lowest <= limit_of(Q.dtype.element_ty, VECTOR):
        out = tl.zeros([C, BV], tl.float32)
        for piece in tl.range(0, KTILES, num_stages=1):
            channels = piece * BK + tl.arange(0, BK)
            if FORWARD:
                out = step_outputs(
                    Q, K, Y, GF, States, forward, out, rows, ok, count, channels, wide, q_n, q_d, k_n, k_d, y_n, y_d, gf_n, gf_d,
                    DK, DV, BK, BV, VECTOR, True, HAS_STATES,
                )  # fmt: skip
            if BACKWARD:
                out = step_outputs(
                    Q, K, Y, GB, States, backward, out, rows, ok, count, channels, wide, q_n, q_d, k_n, k_d, y_n, y_d, gb_n, gb_d,
                    DK, DV, BK, BV, VECTOR, False, HAS_STATES,
                )  # fmt: skip
    place = Out + b * o_b + h * o_h + first * o_n + rows[:, None] * o_n + wide[None, :] * o_d
    tl.store(place, (out * scale).to(Out.dtype.element_ty), mask=ok[:, None] & (wide < DV)[None, :])
