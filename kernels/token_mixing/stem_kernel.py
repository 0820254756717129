"""The Triton kernel of a stem's convolution: a product of gathered patches with the weights, then layer norm over channels and SiLU.

Letters: T places of the output over the whole batch, C channels of the image, K kernel size, S step, P padding, D channels of the output
(DP padded to a power of two), L = C K K values of a patch, BT places of a tile, BL values of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("T", "height", "width", "down", "across"))
def convolve_patches(
    X, W, Bias, NormWeight, NormBias, Y, x_b, x_c, x_h, T, height, width, down, across, eps,
    C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """X [B, C, height, width] with last stride 1, W [L, D], Y [T, D] of maps down x across."""
    L: tl.constexpr = C * K * K
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    b, n = t // (down * across), t % (down * across)
    top, left = n // across * S - P, n % across * S - P
    base = X + b.to(tl.int64) * x_b + top * x_h + left
    dims, steps = tl.arange(0, DP), tl.arange(0, BL)
    total = tl.zeros([BT, DP], tl.float32)
    for first in tl.range(0, L, BL):
        i = first + steps
        c, y, x = i // (K * K), i // K % K, i % K
        ok = (
            ((t < T)[:, None] & (i < L)[None, :])
            & (top[:, None] + y[None, :] >= 0)
            & (top[:, None] + y[None, :] < height)
        )
        ok &= (left[:, None] + x[None, :] >= 0) & (left[:, None] + x[None, :] < width)
        patch = tl.load(base[:, None] + (c * x_c + y * x_h + x)[None, :], mask=ok, other=0.0)
        w = tl.load(W + i[:, None] * D + dims[None, :], mask=(i < L)[:, None] & (dims < D)[None, :], other=0.0)
        total = tl.dot(patch, w, total, input_precision=PRODUCT)
    real = (dims < D)[None, :]
    total += tl.load(Bias + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
    apart = tl.where(real, total - (tl.sum(total, 1) / D)[:, None], 0.0)
    unit = apart * tl.rsqrt(tl.sum(apart * apart, 1) / D + eps)[:, None]
    out = unit * tl.load(NormWeight + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
    out += tl.load(NormBias + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
    out = out * tl.sigmoid(out)
    tl.store(Y + t.to(tl.int64)[:, None] * D + dims[None, :], out.to(Y.dtype.element_ty), mask=(t < T)[:, None] & real)
