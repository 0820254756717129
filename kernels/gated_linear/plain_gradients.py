"""The Triton kernels of linear attention without order, backward. Letters and rules as in plain_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.gated_linear.plain_kernels import feature, load_mean, load_pairs, places, tile_of, weight_of


@triton.jit(do_not_specialize=("N", "H", "scale"))
def query_gradients(
    Q, DO, Pairs, Means, DQ, Outer, Along, Rest, q_b, q_h, q_n, q_d, do_b, do_h, do_n, do_d, dq_b, dq_h, dq_n, dq_d,
    scale, eps, N, H,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    DIVIDE: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Queries' gradients, and the weights [B, H, N] with which token_sums makes those of the sums."""
    bh, heads = tl.program_id(0), tl.num_programs(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, rows = tl.arange(0, KP), tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * BN
    ok = rows < N - first
    raw = tile_of(Q, b, h, first, rows, ok, dims, q_b, q_h, q_n, q_d, DK, ALIGN)
    q = feature(raw, ok, dims, eps if DIVIDE else 0.0, DK)
    back = tl.zeros([BN, KP], tl.float32)
    mean = tl.zeros([BN], tl.float32)
    for part in tl.range(0, DV, BV, num_stages=1):
        wide = part + tl.arange(0, BV)
        do = tile_of(DO, b, h, first, rows, ok, wide, do_b, do_h, do_n, do_d, DV, ALIGN)
        back = tl.dot(
            do.to(KIND), tl.trans(load_pairs(Pairs, bh, dims, wide, DK, DV, KIND)), back, input_precision=PRODUCT
        )
        if not DIVIDE:
            mean += tl.sum(do.to(tl.float32) * load_mean(Means + heads * DK, bh, wide, DV)[None, :], 1)
    keys = load_mean(Means, bh, dims, DK)[None, :]
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
    place = places(DQ, b, h, first, rows, dims, dq_b, dq_h, dq_n, dq_d, ALIGN)
    tl.store(place, tl.where(raw > 0, dq, 0.0).to(DQ.dtype.element_ty), mask=ok[:, None] & (dims < DK)[None, :])
    to = bh.to(tl.int64) * N + first + rows
    tl.store(Outer + to, outer, mask=ok)
    tl.store(Along + to, d_along, mask=ok)
    tl.store(Rest + to, rest, mask=ok)


@triton.jit(do_not_specialize=("N", "H", "inverse"))
def key_gradients(
    K, V, KG, VG, DPairs, DMeans, DK_, DV_, DKG, DVG,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, kg_b, kg_h, kg_n, vg_b, vg_h, vg_n, dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d,
    inverse, eps, N, H,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    HAS_KG: tl.constexpr, HAS_VG: tl.constexpr, MEANS: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Keys', values' and gates' gradients; DKG and DVG [B, H, N], fp32. eps is 0 for subtraction."""
    bh, heads = tl.program_id(0), tl.num_programs(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, rows = tl.arange(0, KP), tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * BN
    ok = rows < N - first
    raw = tile_of(K, b, h, first, rows, ok, dims, k_b, k_h, k_n, k_d, DK, ALIGN)
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
        v = tile_of(V, b, h, first, rows, ok, wide, v_b, v_h, v_n, v_d, DV, ALIGN).to(tl.float32)
        dv = tl.dot(k.to(KIND), pairs, input_precision=PRODUCT)
        if MEANS:
            dv += load_mean(DMeans + heads * DK, bh, wide, DV)[None, :]
        dv *= inverse
        if HAS_VG:
            vg = weight_of(VG + b * vg_b + h * vg_h + first * vg_n, rows, vg_n, ok)
            dvg += tl.sum(dv * v, 1)
            dv *= vg
            v *= vg
        dk = tl.dot(v.to(KIND), tl.trans(pairs), dk, input_precision=PRODUCT)
        place = places(DV_, b, h, first, rows, wide, dv_b, dv_h, dv_n, dv_d, ALIGN)
        tl.store(place, dv.to(DV_.dtype.element_ty), mask=inside)
    dk = (dk + load_mean(DMeans, bh, dims, DK)[None, :]) * inverse
    to = bh.to(tl.int64) * N + first + rows
    if HAS_VG:
        tl.store(DVG + to, dvg, mask=ok)
    if HAS_KG:
        tl.store(DKG + to, tl.sum(dk * own, 1), mask=ok)
        dk *= kg
    place = places(DK_, b, h, first, rows, dims, dk_b, dk_h, dk_n, dk_d, ALIGN)
    tl.store(place, tl.where(raw > 0, dk, 0.0).to(DK_.dtype.element_ty), mask=ok[:, None] & (dims < DK)[None, :])
