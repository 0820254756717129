"""Norm, rotation and token order of queries and keys in one Triton kernel: every tensor is read once and written once.

Letters: B batch, H heads, N tokens, D head dim, P places in the output; BT tokens and BH heads of a tile.

* A program takes BT tokens of q and of k, all their heads: rows of cos and sin are read once for both.
* fp32 inside, without contracted multiply-adds; rounded to the tensors' dtype exactly where the model's own operations round.
* A norm across heads reads its tokens twice; the second time they come from the cache.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.query_key.parts import Norm, Rotation

# Tokens, heads, warps. Of 16 tiles on an H100, within 2 % of the best for 12 heads (Wan, 2.86 TB/s) and 24 (Flux, HunyuanVideo, 2.96
# TB/s); torch's copy of q and k moves 3.1 TB/s.
TILE = (2, 8, 2)
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}  # contracted multiply-adds would round elsewhere than the model


@triton.jit
def pairs(x, BT: tl.constexpr, BH: tl.constexpr, D: tl.constexpr):
    """[BT, BH, D] -> its even and odd channels, fp32 [BT, BH, D / 2]"""
    even, odd = tl.split(tl.reshape(x, [BT, BH, D // 2, 2]))
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def normed(x, inverse, weight, TWICE: tl.constexpr, HAS_WEIGHT: tl.constexpr, KIND: tl.constexpr):
    """x / its size, times the weight, as the model rounds it; fp32."""
    y = x * inverse
    if TWICE:
        y = y.to(KIND).to(tl.float32)
    if HAS_WEIGHT:
        y *= weight
    return y.to(KIND).to(tl.float32)


@triton.jit
def turns(Cos, Sin, rows, ok, cos_n, sin_n, SHARED: tl.constexpr, BT: tl.constexpr, D: tl.constexpr):
    """-> cosines of the even and odd channels, sines of the even and odd channels, fp32 [BT, 1, D / 2]"""
    dims = tl.arange(0, D)
    cos = tl.load(Cos + rows[:, None] * cos_n + dims[None, :], mask=ok[:, None], other=0.0)
    sin = tl.load(Sin + rows[:, None] * sin_n + dims[None, :], mask=ok[:, None], other=0.0)
    cos_even, cos_odd = pairs(cos[:, None, :], BT, 1, D)
    sin_even, sin_odd = pairs(sin[:, None, :], BT, 1, D)
    if SHARED:
        return cos_even, cos_even, sin_odd, sin_odd
    else:
        return cos_even, cos_odd, sin_even, sin_odd


@triton.jit
def finish(
    X, Weight, Out, rows, places, ok, x_n, o_n, eps, angles, H,
    D: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ACROSS: tl.constexpr, TWICE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """One tensor's tokens ``rows``, all heads -> ``places`` of Out."""
    kind: tl.constexpr = X.dtype.element_ty
    heads, dims = tl.arange(0, BH), tl.arange(0, D)
    inside = heads[None, :, None] * D + dims[None, None, :]
    size = tl.zeros([BT], tl.float32)
    if ACROSS:
        for h in range(0, H, BH):
            mask = ok[:, None, None] & (heads < H - h)[None, :, None]
            x = tl.load(X + rows[:, None, None] * x_n + h * D + inside, mask=mask, other=0.0).to(tl.float32)
            size += tl.sum(tl.sum(x * x, axis=2), axis=1)
    for h in range(0, H, BH):
        mask = ok[:, None, None] & (heads < H - h)[None, :, None]
        even, odd = pairs(tl.load(X + rows[:, None, None] * x_n + h * D + inside, mask=mask, other=0.0), BT, BH, D)
        if ACROSS:
            inverse = tl.rsqrt(size / (H * D) + eps)[:, None, None]
        else:
            inverse = tl.rsqrt(tl.sum(even * even + odd * odd, axis=2) / D + eps)[:, :, None]
        left, right = even, odd
        if HAS_WEIGHT:
            own = heads[:, None] * D + dims[None, :]
            at = (Weight + h * D + own) if ACROSS else (Weight + dims[None, :] + 0 * heads[:, None])
            left, right = pairs(tl.load(at, mask=(heads < H - h)[:, None], other=0.0)[None], 1, BH, D)
        even = normed(even, inverse, left, TWICE, HAS_WEIGHT, kind)
        odd = normed(odd, inverse, right, TWICE, HAS_WEIGHT, kind)
        if ROTATE:
            first = even * angles[0] - odd * angles[2]
            odd = odd * angles[1] + even * angles[3]
            even = first
        y = tl.reshape(tl.join(even.to(kind), odd.to(kind)), [BT, BH, D])
        tl.store(Out + places[:, None, None] * o_n + h * D + inside, y, mask=mask)


@triton.jit(do_not_specialize=("H", "P"))
def norm_rotate_order(
    Q, K, QWeight, KWeight, Cos, Sin, Order, QOut, KOut, q_b, q_n, k_b, k_n, qo_b, qo_n, ko_b, ko_n, cos_n, sin_n, q_eps, k_eps, H, P,
    D: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ACROSS: tl.constexpr, TWICE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of P places, B."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    ok, places = at < P, at.to(tl.int64)
    rows = tl.load(Order + at, mask=ok, other=0).to(tl.int64) if ORDERED else places
    angles = (0.0, 0.0, 0.0, 0.0)
    if ROTATE:
        angles = turns(Cos, Sin, rows, ok, cos_n, sin_n, SHARED, BT, D)
    finish(Q + b * q_b, QWeight, QOut + b * qo_b, rows, places, ok, q_n, qo_n, q_eps, angles, H,
           D, BT, BH, ACROSS, TWICE, HAS_WEIGHT, ROTATE)  # fmt: skip
    finish(K + b * k_b, KWeight, KOut + b * ko_b, rows, places, ok, k_n, ko_n, k_eps, angles, H,
           D, BT, BH, ACROSS, TWICE, HAS_WEIGHT, ROTATE)  # fmt: skip


def launch(
    q: Tensor, k: Tensor, norms: tuple[Norm, Norm], rotation: Rotation | None, order: Tensor | None, out: tuple[Tensor, Tensor],
    tile: tuple[int, int, int] = TILE,
) -> None:  # fmt: skip
    """q, k, out [B, N, H, D] with the heads of a token together; checked by the caller."""
    (b, _, h, d), places = q.shape, out[0].shape[1]
    bt, bh, warps = tile
    cos, sin = (q, q) if rotation is None else (rotation.cos, rotation.sin)
    constants: dict[str, Any] = {
        "D": d, "BT": bt, "BH": bh, "ACROSS": norms[0].across, "TWICE": norms[0].twice, "HAS_WEIGHT": norms[0].weight is not None,
        "ROTATE": rotation is not None, "SHARED": rotation is not None and rotation.shared, "ORDERED": order is not None,
    }  # fmt: skip
    weights = (x if norm.weight is None else norm.weight for x, norm in zip((q, k), norms, strict=True))
    norm_rotate_order[(triton.cdiv(places, bt), b)](
        q, k, *weights, cos, sin, q if order is None else order, *out,
        *(s for x in (q, k, *out) for s in x.stride()[:2]), cos.stride(0), sin.stride(0), norms[0].eps, norms[1].eps, h, places,
        num_warps=warps, **OPTIONS, **constants,
    )  # fmt: skip
