"""The Triton kernels of linear attention without order: two passes forward, two backward. Letters and rules as in plain.py.

KP key width padded to a power of two, BV value channels and BN tokens of a tile; P parts of the tokens, summed on their own and then together, so that the
sums are the same in every run (no atomics).

* Each pass reads every token once; in between stand only sums of size [K, V], fp32.
* Products take the inputs' dtype with fp32 sums; where sums meet tokens, bf16 for bf16 inputs, else fp32 (as tf32 for fp16 inputs,
  three tf32 products for fp32 ones): a sum over thousands of tokens could overflow fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(base, rows, ok, dims, stride_n, stride_d, D):
    return tl.load(
        base + rows[:, None] * stride_n + dims[None, :] * stride_d, mask=ok[:, None] & (dims < D)[None, :], other=0.0
    )


@triton.jit
def feature(x, ok, dims, eps, D):
    """relu(x) + eps inside, 0 outside; fp32."""
    return tl.where(ok[:, None] & (dims < D)[None, :], tl.maximum(x.to(tl.float32), 0.0) + eps, 0.0)


@triton.jit
def weight_of(base, rows, stride_n, ok):
    return tl.load(base + rows * stride_n, mask=ok, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=("N", "H", "PER", "inverse"))
def token_sums(
    K, V, KG, VG, KW, VW, Pairs, Keys, Values,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, kg_b, kg_h, kg_n, vg_b, vg_h, vg_n, inverse, eps, N, H, PER,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, HAS_KG: tl.constexpr, HAS_VG: tl.constexpr,
    WEIGHTED: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Part sums over PER tokens: Pairs [P, B H, K, V], Keys [P, B H, K], Values [P, B H, V], each times inverse (1 / N forward).

    WEIGHTED (the backward, of queries and the output's gradients): keys and values are summed with weights of their own, KW and VW
    [B, H, N], and ungated. KIND: what products are taken in.
    """
    bh, heads = tl.program_id(0), tl.num_programs(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, wide, rows = tl.arange(0, KP), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, BN)
    pairs = tl.zeros([KP, BV], tl.float32)
    keys, values = tl.zeros([KP], tl.float32), tl.zeros([BV], tl.float32)
    start = tl.program_id(1) * PER
    for at in tl.range(start, tl.minimum(start + PER, N), BN):
        ok = rows < N - at
        first = tl.full([], 0, tl.int64) + at
        k = feature(tile_of(K + b * k_b + h * k_h + first * k_n, rows, ok, dims, k_n, k_d, DK), ok, dims, eps, DK)
        v = tile_of(V + b * v_b + h * v_h + first * v_n, rows, ok, wide, v_n, v_d, DV).to(tl.float32)
        gated = v
        if HAS_KG:
            k *= weight_of(KG + b * kg_b + h * kg_h + first * kg_n, rows, kg_n, ok)
        if HAS_VG:
            gated = v * weight_of(VG + b * vg_b + h * vg_h + first * vg_n, rows, vg_n, ok)
        pairs = tl.dot(tl.trans(k.to(KIND)), gated.to(KIND), pairs, input_precision=PRODUCT)
        if WEIGHTED:
            keys += tl.sum(k * weight_of(KW + bh.to(tl.int64) * N + first, rows, 1, ok), 0)
            values += tl.sum(v * weight_of(VW + bh.to(tl.int64) * N + first, rows, 1, ok), 0)
        else:
            keys += tl.sum(k, 0)
            values += tl.sum(gated, 0)
    to = (tl.program_id(1) * heads + bh).to(tl.int64)
    inside = (dims < DK)[:, None] & (wide < DV)[None, :]
    tl.store(Pairs + to * DK * DV + dims[:, None] * DV + wide[None, :], pairs * inverse, mask=inside)
    tl.store(Keys + to * DK + dims, keys * inverse, mask=(dims < DK) & (tl.program_id(2) == 0))
    tl.store(Values + to * DV + wide, values * inverse, mask=wide < DV)


@triton.jit
def load_pairs(Pairs, bh, dims, wide, DK: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr):
    inside = (dims < DK)[:, None] & (wide < DV)[None, :]
    return tl.load(Pairs + bh.to(tl.int64) * (DK * DV) + dims[:, None] * DV + wide[None, :], mask=inside, other=0.0).to(
        KIND
    )


@triton.jit
def load_mean(Mean, bh, dims, D: tl.constexpr):
    return tl.load(Mean + bh.to(tl.int64) * D + dims, mask=dims < D, other=0.0)[None, :]


@triton.jit(do_not_specialize=("N", "H", "scale"))
def attend(
    Q, Pairs, Keys, Values, Out, q_b, q_h, q_n, q_d, o_b, o_h, o_n, o_d, scale, eps, N, H,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, DIVIDE: tl.constexpr,
    KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, wide, rows = tl.arange(0, KP), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * BN
    ok = rows < N - first
    add = eps if DIVIDE else 0.0
    q = feature(tile_of(Q + b * q_b + h * q_h + first * q_n, rows, ok, dims, q_n, q_d, DK), ok, dims, add, DK)
    s = tl.dot(q.to(KIND), load_pairs(Pairs, bh, dims, wide, DK, DV, KIND), input_precision=PRODUCT)
    along = tl.sum(q * load_mean(Keys, bh, dims, DK), 1)[:, None]
    if DIVIDE:
        out = s / tl.where(ok[:, None], along + eps, 1.0)
    else:
        out = scale * s + (1.0 - scale * along) * load_mean(Values, bh, wide, DV)
    place = Out + b * o_b + h * o_h + first * o_n + rows[:, None] * o_n + wide[None, :] * o_d
    tl.store(place, out.to(Out.dtype.element_ty), mask=ok[:, None] & (wide < DV)[None, :])


@triton.jit(do_not_specialize=("N", "H", "scale"))
def query_gradients(
    Q, DO, Pairs, Keys, Values, DQ, Outer, Along, Rest, q_b, q_h, q_n, q_d, do_b, do_h, do_n, do_d, dq_b, dq_h, dq_n, dq_d,
    scale, eps, N, H,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, DIVIDE: tl.constexpr,
    KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Queries' gradients, and the weights [B, H, N] with which token_sums makes those of the sums: of pairs, keys and values."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, rows = tl.arange(0, KP), tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * BN
    ok = rows < N - first
    raw = tile_of(Q + b * q_b + h * q_h + first * q_n, rows, ok, dims, q_n, q_d, DK)
    q = feature(raw, ok, dims, eps if DIVIDE else 0.0, DK)
    back = tl.zeros([BN, KP], tl.float32)
    mean = tl.zeros([BN], tl.float32)
    for part in tl.range(0, DV, BV, num_stages=1):
        wide = part + tl.arange(0, BV)
        do = tile_of(DO + b * do_b + h * do_h + first * do_n, rows, ok, wide, do_n, do_d, DV)
        back = tl.dot(
            do.to(KIND), tl.trans(load_pairs(Pairs, bh, dims, wide, DK, DV, KIND)), back, input_precision=PRODUCT
        )
        if not DIVIDE:
            mean += tl.sum(do.to(tl.float32) * load_mean(Values, bh, wide, DV), 1)
    keys = load_mean(Keys, bh, dims, DK)
    along = tl.sum(q * keys, 1)
    if DIVIDE:
        outer = 1.0 / tl.where(ok, along + eps, 1.0)
        d_along = -tl.sum(q * back, 1) * outer * outer
        rest = tl.zeros_like(along)
    else:
        outer = tl.zeros_like(along) + scale
        d_along = -scale * mean
        rest = 1.0 - scale * along
    dq = back * outer[:, None] + d_along[:, None] * keys
    place = DQ + b * dq_b + h * dq_h + first * dq_n + rows[:, None] * dq_n + dims[None, :] * dq_d
    tl.store(place, tl.where(raw > 0, dq, 0.0).to(DQ.dtype.element_ty), mask=ok[:, None] & (dims < DK)[None, :])
    to = bh.to(tl.int64) * N + first + rows
    tl.store(Outer + to, outer, mask=ok)
    tl.store(Along + to, d_along, mask=ok)
    tl.store(Rest + to, rest, mask=ok)


@triton.jit(do_not_specialize=("N", "H", "inverse"))
def key_gradients(
    K, V, KG, VG, DPairs, DKeys, DValues, DK_, DV_, DKG, DVG,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, kg_b, kg_h, kg_n, vg_b, vg_h, vg_n, dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d,
    inverse, eps, N, H,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, HAS_KG: tl.constexpr, HAS_VG: tl.constexpr,
    KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Keys', values' and gates' gradients; DKG and DVG [B, H, N], fp32. eps is 0 for subtraction."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, rows = tl.arange(0, KP), tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * BN
    ok = rows < N - first
    raw = tile_of(K + b * k_b + h * k_h + first * k_n, rows, ok, dims, k_n, k_d, DK)
    own = feature(raw, ok, dims, eps, DK)
    k = own
    if HAS_KG:
        kg = weight_of(KG + b * kg_b + h * kg_h + first * kg_n, rows, kg_n, ok)
        k = own * kg
    dk = tl.zeros([BN, KP], tl.float32)
    dvg = tl.zeros([BN], tl.float32)
    for part in tl.range(0, DV, BV, num_stages=1):
        wide = part + tl.arange(0, BV)
        inside = ok[:, None] & (wide < DV)[None, :]
        pairs = load_pairs(DPairs, bh, dims, wide, DK, DV, KIND)
        v = tile_of(V + b * v_b + h * v_h + first * v_n, rows, ok, wide, v_n, v_d, DV).to(tl.float32)
        dv = (tl.dot(k.to(KIND), pairs, input_precision=PRODUCT) + load_mean(DValues, bh, wide, DV)) * inverse
        if HAS_VG:
            vg = weight_of(VG + b * vg_b + h * vg_h + first * vg_n, rows, vg_n, ok)
            dvg += tl.sum(dv * v, 1)
            dv *= vg
            v *= vg
        dk = tl.dot(v.to(KIND), tl.trans(pairs), dk, input_precision=PRODUCT)
        place = DV_ + b * dv_b + h * dv_h + first * dv_n + rows[:, None] * dv_n + wide[None, :] * dv_d
        tl.store(place, dv.to(DV_.dtype.element_ty), mask=inside)
    dk = (dk + load_mean(DKeys, bh, dims, DK)) * inverse
    to = bh.to(tl.int64) * N + first + rows
    if HAS_VG:
        tl.store(DVG + to, dvg, mask=ok)
    if HAS_KG:
        tl.store(DKG + to, tl.sum(dk * own, 1), mask=ok)
        dk *= kg
    place = DK_ + b * dk_b + h * dk_h + first * dk_n + rows[:, None] * dk_n + dims[None, :] * dk_d
    tl.store(place, tl.where(raw > 0, dk, 0.0).to(DK_.dtype.element_ty), mask=ok[:, None] & (dims < DK)[None, :])
