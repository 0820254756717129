"""The Triton kernels of linear attention without order, forward: sums over tokens, their parts joined, each query with them.

Letters and rules as in plain.py. KP key width padded to a power of two, BV value channels and BN tokens of a tile; P parts of the tokens, summed on their own and
then together, so that the sums are the same in every run (no atomics).

* Each pass reads every token once; in between stand only sums of size [K, V], made in fp32. A program of ``attend`` loads them once, for PER queries.
* Products take the inputs' dtype with fp32 sums; where sums meet tokens, bf16 for bf16 inputs, else fp32 (as tf32 for fp16 inputs,
  three tf32 products for fp32 ones): a sum over thousands of tokens could overflow fp16.
* ALIGN promises that rows begin at multiples of that many elements: rows of a head of 72 channels would else be read two bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIDE = tl.constexpr(16)  # the fewest columns that a product takes


@triton.jit
def places(X, b, h, first, rows, dims, x_b, x_h, x_n, x_d, ALIGN: tl.constexpr):
    """Where channels ``dims`` of the tokens ``first + rows`` lie."""
    start = tl.multiple_of(b * x_b + h * x_h + first * x_n, ALIGN)
    return X + start + tl.multiple_of(rows * x_n, ALIGN)[:, None] + dims[None, :] * x_d


@triton.jit
def tile_of(X, b, h, first, rows, ok, dims, x_b, x_h, x_n, x_d, D: tl.constexpr, ALIGN: tl.constexpr):
    place = places(X, b, h, first, rows, dims, x_b, x_h, x_n, x_d, ALIGN)
    return tl.load(place, mask=ok[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def feature(x, ok, dims, eps, D):
    """relu(x) + eps inside, 0 outside; fp32."""
    return tl.where(ok[:, None] & (dims < D)[None, :], tl.maximum(x.to(tl.float32), 0.0) + eps, 0.0)


@triton.jit
def weight_of(base, rows, stride_n, ok):
    return tl.load(base + rows * stride_n, mask=ok, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=("N", "H", "PER", "size", "skip", "inverse"))
def token_sums(
    K, V, KG, VG, KW, VW, Pairs, Means,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, kg_b, kg_h, kg_n, vg_b, vg_h, vg_n, inverse, eps, N, H, PER, size, skip,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    HAS_KG: tl.constexpr, HAS_VG: tl.constexpr, WEIGHTED: tl.constexpr, MEANS: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Sums over PER tokens times inverse: Pairs [B H, K, V]; in Means after ``skip`` entries those of keys [B H, K] and, with MEANS, of
    values [B H, V]. Those of the next PER tokens follow ``size`` entries later.

    WEIGHTED (the backward, of queries and the output's gradients): keys and values are summed with weights of their own, KW and VW
    [B, H, N], and ungated. KIND: what products are taken in.

    Both gates of a product go with its key, which passes registers anyway: values go to the product as they were loaded. Keys and values are
    summed tile on tile, and across threads once, after the last: a sum of each tile made the loop twice as long.
    """
    bh, heads = tl.program_id(0), tl.num_programs(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, wide, rows = tl.arange(0, KP), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, BN)
    pairs = tl.zeros([KP, BV], tl.float32)
    keys, values = tl.zeros([BN, KP], tl.float32), tl.zeros([BN, BV], tl.float32)
    start = tl.program_id(1) * PER
    for at in tl.range(start, tl.minimum(start + PER, N), BN):
        ok = rows < N - at
        first = tl.full([], 0, tl.int64) + at
        k = feature(tile_of(K, b, h, first, rows, ok, dims, k_b, k_h, k_n, k_d, DK, ALIGN), ok, dims, eps, DK)
        v = tile_of(V, b, h, first, rows, ok, wide, v_b, v_h, v_n, v_d, DV, ALIGN)
        if HAS_KG:
            k *= weight_of(KG + b * kg_b + h * kg_h + first * kg_n, rows, kg_n, ok)
        both = k
        if HAS_VG:
            value_gate = weight_of(VG + b * vg_b + h * vg_h + first * vg_n, rows, vg_n, ok)
            both = k * value_gate
        pairs = tl.dot(tl.trans(both.to(KIND)), v.to(KIND), pairs, input_precision=PRODUCT)
        if WEIGHTED:
            keys += k * weight_of(KW + bh.to(tl.int64) * N + first, rows, 1, ok)
            if MEANS:
                values += v.to(tl.float32) * weight_of(VW + bh.to(tl.int64) * N + first, rows, 1, ok)
        else:
            keys += k
            if MEANS:
                values += v.to(tl.float32) * value_gate if HAS_VG else v.to(tl.float32)
    part = tl.program_id(1).to(tl.int64) * size
    inside = (dims < DK)[:, None] & (wide < DV)[None, :]
    place = Pairs + part + bh.to(tl.int64) * (DK * DV) + dims[:, None] * DV + wide[None, :]
    tl.store(place, (pairs * inverse).to(Pairs.dtype.element_ty), mask=inside)
    tl.store(
        Means + part + skip + bh * DK + dims, tl.sum(keys, 0) * inverse, mask=(dims < DK) & (tl.program_id(2) == 0)
    )
    if MEANS:
        tl.store(Means + part + skip + heads * DK + bh * DV + wide, tl.sum(values, 0) * inverse, mask=wide < DV)


@triton.jit(do_not_specialize=("P", "size", "pairs", "inverse"))
def join_parts(Parts, Pairs, Means, P, size, pairs, inverse, BLOCK: tl.constexpr, BP: tl.constexpr):
    """Sums of P parts [P, size] times inverse: the first ``pairs`` entries go to Pairs in its dtype, the others to Means, fp32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, P, BP):
        part = first + tl.arange(0, BP)
        inside = (part < P)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(Parts + part.to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0), 0)
    total *= inverse
    tl.store(Pairs + at, total.to(Pairs.dtype.element_ty), mask=at < pairs)
    tl.store(Means + (at - pairs), total, mask=(at >= pairs) & (at < size))


@triton.jit
def load_pairs(Pairs, bh, dims, wide, DK: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr):
    inside = (dims < DK)[:, None] & (wide < DV)[None, :]
    place = Pairs + bh.to(tl.int64) * (DK * DV) + dims[:, None] * DV + wide[None, :]
    return tl.load(place, mask=inside, other=0.0).to(KIND)


@triton.jit
def load_mean(Mean, bh, dims, D: tl.constexpr):
    return tl.load(Mean + bh.to(tl.int64) * D + dims, mask=dims < D, other=0.0)


@triton.jit
def as_columns(x, KIND: tl.constexpr):
    """x [R] in fp32 -> [R, SIDE] in KIND, whose rows sum to x: x rounded, what that left out, zeros."""
    column = tl.arange(0, SIDE)[None, :]
    near = x.to(KIND)
    left = (x - near.to(tl.float32)).to(KIND)
    return tl.where(column == 0, near[:, None], tl.where(column == 1, left[:, None], tl.zeros_like(near)[:, None]))


@triton.jit(do_not_specialize=("N", "H", "PER", "skip", "scale"))
def attend(
    Q, Pairs, Means, Added, Out, q_b, q_h, q_n, q_d, o_b, o_h, o_n, o_d, a_b, a_h, a_n, a_d, scale, eps, N, H, PER, skip,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr, DIVIDE: tl.constexpr,
    HAS_ADDED: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """PER queries with the sums. HAS_ADDED: Added [B, H, N - skip, V] is added to the outputs from token ``skip`` on.

    COLUMNS: queries meet the mean of keys in a product, without a sum of a whole tile across threads.
    """
    bh, heads = tl.program_id(0), tl.num_programs(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    dims, wide, rows = tl.arange(0, KP), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, BN)
    pairs = load_pairs(Pairs, bh, dims, wide, DK, DV, KIND)
    keys = load_mean(Means, bh, dims, DK)
    columns = as_columns(keys, KIND)
    start = tl.program_id(1) * PER
    for at in tl.range(start, tl.minimum(start + PER, N), BN):
        ok = rows < N - at
        first = tl.full([], 0, tl.int64) + at
        q = tile_of(Q, b, h, first, rows, ok, dims, q_b, q_h, q_n, q_d, DK, ALIGN)
        q = tl.maximum(q.to(tl.float32), 0.0) + (eps if DIVIDE else 0.0)  # times zeros outside
        s = tl.dot(q.to(KIND), pairs, input_precision=PRODUCT)
        along = tl.dot(q.to(KIND), columns) if COLUMNS else q * keys[None, :]
        along = tl.sum(along, 1)[:, None]
        if DIVIDE:
            out = s / tl.where(ok[:, None], along + eps, 1.0)
        else:
            out = scale * s + (1.0 - scale * along) * load_mean(Means + heads * DK, bh, wide, DV)[None, :]
        if HAS_ADDED:
            seen = ok & (rows >= skip - at)
            out += tile_of(Added, b, h, first - skip, rows, seen, wide, a_b, a_h, a_n, a_d, DV, ALIGN).to(tl.float32)
        place = places(Out, b, h, first, rows, wide, o_b, o_h, o_n, o_d, ALIGN)
        tl.store(place, out.to(Out.dtype.element_ty), mask=ok[:, None] & (wide < DV)[None, :])
