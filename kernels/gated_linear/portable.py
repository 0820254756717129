"""The Triton kernels of gated linear attention: sums of a chunk, states between chunks, outputs (and values' gradients) of a chunk.

Letters: B batch, H heads, N tokens, K key width, V value width, C tokens of a chunk, M chunks, BK key channels of a tile, VP value
width padded to a power of two. Gates are in log2 units inside.

* The split of a chunk into levels, and why nothing can overflow or cancel, is told in chunked.py. Here all pairs of a level are one
  product of whole tiles, of which a mask keeps that level's pairs: tensor cores are cheaper than moving quarters of tiles around.
* Both directions share that product: at one level a token of a right half asks forwards and is asked backwards, a token of a left
  half the reverse, so one pair of factors a token serves both, and the chunk's matrix of weights is simply full.
* A gate of one number per head is summed over runs in the same way, but multiplies a single product of queries and keys.
* Gates, sums, states and accumulators are fp32. Products take the inputs' dtype; those with states take bf16 for bf16 inputs, else
  fp32 (as tf32 for fp16 inputs), because a state in fp16 could overflow. Products of fp32 inputs are three tf32 products each
  (tf32x3: errors of fp32's size): true fp32 products of these tiles do not fit the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(base, rows, ok, dims, stride_n, stride_d, D):
    """Rows of [.., N, D] -> [rows, dims], 0 outside."""
    return tl.load(
        base + rows[:, None] * stride_n + dims[None, :] * stride_d, mask=ok[:, None] & (dims < D)[None, :], other=0.0
    )


@triton.jit
def load_gate(base, rows, ok, dims, stride_n, stride_d, D, VECTOR: tl.constexpr):
    """-> log2 gates [rows, dims], or [rows, 1] for one gate a head."""
    if VECTOR:
        gate = load_tile(base, rows, ok, dims, stride_n, stride_d, D)
    else:
        gate = tl.load(base + rows * stride_n, mask=ok, other=0.0)[:, None]
    return gate.to(tl.float32) * LOG2E


@triton.jit
def doubled(upto, after, rows, LEVEL):
    """Sums over blocks of 2^LEVEL tokens -> over blocks twice as long: add what the neighbouring block holds in all."""
    whole = upto + after
    index = tl.broadcast_to((rows ^ (1 << LEVEL))[:, None], whole.shape)
    other = tl.gather(whole, index, 0)
    right = (((rows >> LEVEL) & 1) != 0)[:, None]
    return upto + tl.where(right, other, 0.0), after + tl.where(right, 0.0, other)


@triton.jit
def apart(rows, LEVEL, FORWARD: tl.constexpr, BACKWARD: tl.constexpr):
    """[query, key]: pairs that this level separates, in the order that the direction reads."""
    query, key = rows[:, None], rows[None, :]
    here = ((query ^ key) >> LEVEL) == 1
    if FORWARD and BACKWARD:
        return here
    elif FORWARD:
        return here & (query > key)
    else:
        return here & (query < key)


@triton.jit
def factors(fu, fa, bu, ba, rows, LEVEL, FORWARD: tl.constexpr, BACKWARD: tl.constexpr):
    """exp of the sums from each token to the middle of its block, as a query and as a key. Forward/backward, upto/after."""
    right = (((rows >> LEVEL) & 1) != 0)[:, None]
    if FORWARD and BACKWARD:
        return tl.exp2(tl.where(right, fu, ba)), tl.exp2(tl.where(right, bu, fa))
    elif FORWARD:
        both = tl.exp2(tl.where(right, fu, fa))
        return both, both
    else:
        both = tl.exp2(tl.where(right, bu, ba))
        return both, both


@triton.jit
def pair_weights(
    a, q, k, fu, fa, bu, ba, rows, LEVELS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, PRODUCT: tl.constexpr
):  # fmt: skip
    """Adds this tile's share of every pair's weight to a [C, C]; -> a, and the sums over the whole chunk."""
    for level in tl.range(0, LEVELS, num_stages=1):
        query, key = factors(fu, fa, bu, ba, rows, level, FORWARD, BACKWARD)
        qx, kx = (q * query).to(q.dtype), (k * key).to(k.dtype)
        s = tl.dot(qx, tl.trans(kx), a, input_precision=PRODUCT)
        a = tl.where(apart(rows, level, FORWARD, BACKWARD), s, a)
        if FORWARD:
            fu, fa = doubled(fu, fa, rows, level)
        if BACKWARD:
            bu, ba = doubled(bu, ba, rows, level)
    return a, fu, fa, bu, ba


@triton.jit
def pair_decays(
    fu, fa, bu, ba, rows, C: tl.constexpr, LEVELS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr
):
    """One gate a head, sums [C, 1]: the decay between every pair [C, C] (0 where no direction reads it, counted on the diagonal)."""
    span = tl.full([C, C], -float("inf"), tl.float32)
    for level in tl.range(0, LEVELS, num_stages=1):
        right = (((rows >> level) & 1) != 0)[:, None]
        if FORWARD and BACKWARD:
            query, key = tl.where(right, fu, ba), tl.where(right, bu, fa)
        elif FORWARD:
            query, key = fu, fa
        else:
            query, key = ba, bu
        span = tl.where(apart(rows, level, FORWARD, BACKWARD), query + tl.trans(key), span)
        if FORWARD:
            fu, fa = doubled(fu, fa, rows, level)
        if BACKWARD:
            bu, ba = doubled(bu, ba, rows, level)
    own: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
    return tl.where(rows[:, None] == rows[None, :], own, tl.exp2(span)), fu, fa, bu, ba


@triton.jit
def both_sums(
    GF,
    GB,
    rows,
    ok,
    dims,
    gf_n,
    gf_d,
    gb_n,
    gb_d,
    D,
    VECTOR: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """(upto, after) of blocks of one token: forward sums take a token's own gate before it, backward ones after it."""
    if FORWARD:
        fu = load_gate(GF, rows, ok, dims, gf_n, gf_d, D, VECTOR)
        fa = tl.zeros_like(fu)
        if not BACKWARD:
            bu, ba = fu, fa
    if BACKWARD:
        ba = load_gate(GB, rows, ok, dims, gb_n, gb_d, D, VECTOR)
        bu = tl.zeros_like(ba)
        if not FORWARD:
            fu, fa = bu, ba
    return fu, fa, bu, ba


@triton.jit
def running_sum(x, REVERSE: tl.constexpr):
    """Cumulative sum over rows. [C, 1] goes as a vector: triton 3.6 fails to compile the scan of a single column."""
    if x.shape[1] == 1:
        return tl.cumsum(tl.sum(x, 1), 0, reverse=REVERSE)[:, None]
    else:
        return tl.cumsum(x, 0, reverse=REVERSE)


UNSPECIALISED = ("H", "N", "M", "scale", "lead")


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_sums(
    X, Y, GF, GB, Sums, Keep,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, gf_b, gf_h, gf_n, gf_d, gb_b, gb_h, gb_n, gb_d,
    scale, H, N, M, lead,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, VP: tl.constexpr, KTILES: tl.constexpr, C: tl.constexpr,
    VECTOR: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, QUERY: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state it hands on, ``(x * decay to the chunk's end)^T y``, and the log2 decay across the chunk.

    x are keys and y values; or (QUERY) x are queries and y the output's gradient, for the states' gradients, which run the other
    way. Sums [directions, B H, M, K, V], Keep [directions, B H, M, K or 1]; lead = B H M.
    """
    tile = tl.program_id(0) % KTILES
    at = tl.program_id(0) // KTILES  # (batch, head, chunk)
    m, bh = at % M, at // M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    first = m.to(tl.int64) * C
    rows = tl.arange(0, C)
    ok = rows < N - m * C
    dims, wide = tile * BK + tl.arange(0, BK), tl.arange(0, VP)
    x = load_tile(X + b * x_b + h * x_h + first * x_n, rows, ok, dims, x_n, x_d, DK)
    y = load_tile(Y + b * y_b + h * y_h + first * y_n, rows, ok, wide, y_n, y_d, DV)
    if FORWARD:
        _one_sum(
            x,
            y,
            GF + b * gf_b + h * gf_h + first * gf_n,
            gf_n,
            gf_d,
            Sums,
            Keep,
            rows,
            ok,
            dims,
            wide,
            at,
            scale,
            DK,
            DV,
            C,
            VECTOR,
            QUERY,
            not QUERY,
            PRODUCT,
        )
    if BACKWARD:
        to = tl.where(FORWARD, lead, 0) + at
        _one_sum(
            x,
            y,
            GB + b * gb_b + h * gb_h + first * gb_n,
            gb_n,
            gb_d,
            Sums,
            Keep,
            rows,
            ok,
            dims,
            wide,
            to,
            scale,
            DK,
            DV,
            C,
            VECTOR,
            QUERY,
            QUERY,
            PRODUCT,
        )


@triton.jit
def _one_sum(
    x, y, gates, g_n, g_d, Sums, Keep, rows, ok, dims, wide, to, scale,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, OWN: tl.constexpr, TO_END: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """OWN: a token's own gate lies between it and the state; TO_END: the state is to the right of the chunk."""
    gate = load_gate(gates, rows, ok, dims, g_n, g_d, DK, VECTOR)
    whole = tl.sum(gate, 0)
    if not OWN:  # the gates beside each token instead: sums without subtracting anything
        beside = rows + (1 if TO_END else -1)
        inside = (beside >= 0) & (beside < C) & (tl.sum(ok.to(tl.int32), 0) > beside)
        gate = load_gate(gates, beside, inside, dims, g_n, g_d, DK, VECTOR)
    span = running_sum(gate, TO_END)
    xx = (x * tl.exp2(span)).to(x.dtype)
    total = tl.dot(tl.trans(xx), y, input_precision=PRODUCT) * scale
    place = Sums + to.to(tl.int64) * (DK * DV) + dims[:, None] * DV + wide[None, :]
    tl.store(place, total.to(Sums.dtype.element_ty), mask=(dims < DK)[:, None] & (wide < DV)[None, :])
    if VECTOR:
        tl.store(Keep + to.to(tl.int64) * DK + dims, whole, mask=dims < DK)
    else:
        tl.store(Keep + to.to(tl.int64) + tl.zeros_like(whole).to(tl.int32), whole)


@triton.jit(do_not_specialize=("M", "lead"))
def scan_states(
    Sums, Keep, First, Last, M, lead,
    DK: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, RTILES: tl.constexpr, VTILES: tl.constexpr,
    VECTOR: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, NEED_LAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Turns what chunks add into the states that enter them, in place. Directions alternate; lead = B H programs of each.

    First and Last [B H, K, V] belong to the first direction. REVERSE: that direction runs from the last chunk to the first.
    """
    pid = tl.program_id(0)
    part, head = pid % (RTILES * VTILES), pid // (RTILES * VTILES)
    dims, wide = part // VTILES * BR + tl.arange(0, BR), part % VTILES * BV + tl.arange(0, BV)
    ok = (dims < DK)[:, None] & (wide < DV)[None, :]
    second = head >= lead
    back = second != REVERSE
    offset = dims[:, None] * DV + wide[None, :]
    state = tl.zeros([BR, BV], tl.float32)
    if HAS_FIRST:
        state = tl.load(First + head.to(tl.int64) * (DK * DV) + offset, mask=ok & (not second), other=0.0).to(
            tl.float32
        )
    start = head.to(tl.int64) * M
    for i in tl.range(0, M, num_stages=STAGES):
        at = start + tl.where(back, M - 1 - i, i)
        place = Sums + at * (DK * DV) + offset
        added = tl.load(place, mask=ok, other=0.0).to(tl.float32)
        if VECTOR:
            keep = tl.exp2(tl.load(Keep + at * DK + dims, mask=dims < DK, other=0.0))[:, None]
        else:
            keep = tl.exp2(tl.load(Keep + at))
        tl.store(place, state.to(Sums.dtype.element_ty), mask=ok)
        state = keep * state + added
    if NEED_LAST:
        tl.store(Last + head.to(tl.int64) * (DK * DV) + offset, state, mask=ok & (not second))


@triton.jit
def load_state(States, at, dims, wide, DK: tl.constexpr, DV: tl.constexpr):
    """-> [BK, VP]"""
    place = States + at.to(tl.int64) * (DK * DV) + dims[:, None] * DV + wide[None, :]
    return tl.load(place, mask=(dims < DK)[:, None] & (wide < DV)[None, :], other=0.0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_apply(
    Q, K, Y, GF, GB, States, Out,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, y_b, y_h, y_n, y_d, gf_b, gf_h, gf_n, gf_d, gb_b, gb_h, gb_n, gb_d, o_b, o_h, o_n, o_d,
    scale, H, N, M, lead,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, VP: tl.constexpr, KTILES: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    VECTOR: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, HAS_STATES: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRODUCT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """out = A y + decayed queries x states; or (TRANSPOSED) values' gradient = A^T y + decayed keys x states' gradients.

    A [C, C]: scaled weights of the chunk's pairs. One program per chunk and head.
    """
    at = tl.program_id(0)
    m, bh = at % M, at // M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    first = m.to(tl.int64) * C
    rows = tl.arange(0, C)
    ok = rows < N - m * C
    wide = tl.arange(0, VP)
    a = tl.zeros([C, C], tl.float32)
    self_weight = tl.zeros([C], tl.float32)
    out = tl.zeros([C, VP], tl.float32)
    for tile in tl.static_range(KTILES):
        dims = tile * BK + tl.arange(0, BK)
        q = load_tile(Q + b * q_b + h * q_h + first * q_n, rows, ok, dims, q_n, q_d, DK)
        k = load_tile(K + b * k_b + h * k_h + first * k_n, rows, ok, dims, k_n, k_d, DK)
        fu, fa, bu, ba = both_sums(
            GF + b * gf_b + h * gf_h + first * gf_n, GB + b * gb_b + h * gb_h + first * gb_n, rows, ok, dims,
            gf_n, gf_d, gb_n, gb_d, DK, VECTOR, FORWARD, BACKWARD,
        )  # fmt: skip
        if VECTOR:
            a, fu, fa, bu, ba = pair_weights(a, q, k, fu, fa, bu, ba, rows, LEVELS, FORWARD, BACKWARD, PRODUCT)
            self_weight += tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        else:
            a = tl.dot(q, tl.trans(k), a, input_precision=PRODUCT)
            decay, fu, fa, bu, ba = pair_decays(fu, fa, bu, ba, rows, C, LEVELS, FORWARD, BACKWARD)
        if HAS_STATES:
            if FORWARD:
                s = load_state(States, at, dims, wide, DK, DV)
                x = (k * tl.exp2(fa)) if TRANSPOSED else (q * tl.exp2(fu)) * scale
                out = tl.dot(x.to(s.dtype), s, out, input_precision=MIXED)
            if BACKWARD:
                s = load_state(States, tl.where(FORWARD, lead, 0) + at, dims, wide, DK, DV)
                x = (k * tl.exp2(bu)) if TRANSPOSED else (q * tl.exp2(ba)) * scale
                out = tl.dot(x.to(s.dtype), s, out, input_precision=MIXED)
    if VECTOR:
        own: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
        a = tl.where(rows[:, None] == rows[None, :], own * self_weight[:, None], a)
    else:
        a = a * decay
    y = load_tile(Y + b * y_b + h * y_h + first * y_n, rows, ok, wide, y_n, y_d, DV)
    weights = (a * scale).to(y.dtype)
    out = tl.dot(tl.trans(weights) if TRANSPOSED else weights, y, out, input_precision=PRODUCT)
    place = Out + b * o_b + h * o_h + first * o_n + rows[:, None] * o_n + wide[None, :] * o_d
    tl.store(place, out.to(Out.dtype.element_ty), mask=ok[:, None] & (wide < DV)[None, :])
