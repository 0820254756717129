"""The Triton kernels of the gates: log gates out of a narrow projection, and SwiGLU.

Letters: T tokens of the whole batch, R width of the narrow projection, G gates, I width of SwiGLU's halves.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit(do_not_specialize=("T",))
def narrow_log_gates(
    X, W, Bias, Grad, Y, Sums, x_t, T, inverse,
    R: tl.constexpr, RP: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """Y = logsigmoid(X W^T + Bias) * inverse; or (HAS_GRAD) Grad times its derivative, and its Sums [tiles, G]. X [T, R], W [G, R]."""
    tiles: tl.constexpr = (G + BG - 1) // BG
    t = tl.program_id(0) // tiles * BT + tl.arange(0, BT)
    g = tl.program_id(0) % tiles * BG + tl.arange(0, BG)
    r = tl.arange(0, RP)
    x = tl.load(X + t.to(tl.int64)[:, None] * x_t + r[None, :], mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
    w = tl.load(W + g[None, :] * R + r[:, None], mask=(g < G)[None, :] & (r < R)[:, None], other=0.0)
    logit = tl.dot(x, w.to(x.dtype), input_precision=PRODUCT)
    if HAS_BIAS:
        logit += tl.load(Bias + g, mask=g < G, other=0.0).to(tl.float32)[None, :]
    place, ok = t.to(tl.int64)[:, None] * G + g[None, :], (t < T)[:, None] & (g < G)[None, :]
    if HAS_GRAD:
        y = tl.load(Grad + place, mask=ok, other=0.0).to(tl.float32) * tl.sigmoid(-logit) * inverse
        if HAS_BIAS:
            tl.store(Sums + tl.program_id(0) // tiles * G + g, tl.sum(y, 0), mask=g < G)
    else:
        y = log_sigmoid(logit) * inverse
    tl.store(Y + place, y.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=("T",))
def swiglu_forward(X, Y, x_t, T, I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr):  # noqa: E741
    """X [T, 2 I] with rows x_t apart -> Y [T, I] = silu(first half) * second half"""
    tiles: tl.constexpr = (I + BI - 1) // BI
    t = tl.program_id(0) // tiles * BT + tl.arange(0, BT)
    i = tl.program_id(0) % tiles * BI + tl.arange(0, BI)
    ok = (t < T)[:, None] & (i < I)[None, :]
    place = X + t.to(tl.int64)[:, None] * x_t + i[None, :]
    a, b = tl.load(place, mask=ok, other=0.0).to(tl.float32), tl.load(place + I, mask=ok, other=0.0).to(tl.float32)
    y = a * tl.sigmoid(a) * b
    tl.store(Y + t.to(tl.int64)[:, None] * I + i[None, :], y.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=("T",))
def swiglu_backward(X, Grad, DX, x_t, T, I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr):  # noqa: E741
    tiles: tl.constexpr = (I + BI - 1) // BI
    t = tl.program_id(0) // tiles * BT + tl.arange(0, BT)
    i = tl.program_id(0) % tiles * BI + tl.arange(0, BI)
    ok = (t < T)[:, None] & (i < I)[None, :]
    place = X + t.to(tl.int64)[:, None] * x_t + i[None, :]
    a, b = tl.load(place, mask=ok, other=0.0).to(tl.float32), tl.load(place + I, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(Grad + t.to(tl.int64)[:, None] * I + i[None, :], mask=ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(a)
    to = DX + t.to(tl.int64)[:, None] * (2 * I) + i[None, :]
    tl.store(to, (grad * b * gate * (1.0 + a * (1.0 - gate))).to(DX.dtype.element_ty), mask=ok)
    tl.store(to + I, (grad * a * gate).to(DX.dtype.element_ty), mask=ok)
