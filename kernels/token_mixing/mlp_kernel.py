"""The Triton kernel of all that follows a narrow block's attention: mix, projection, residual sums, norm and SwiGLU, nothing of which is stored.

Letters: T tokens of the whole batch, D width, I hidden width, V width of a head, BT tokens of a tile, BI hidden channels of a step.

* D is taken in two parts, D0 and D1, each a power of two (D1 may be 0): 192 is 128 + 64, without padding.
* The sum that goes past the MLP waits in its accumulators.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.token_mixing.norm_kernels import load_rows, normalised, save


@triton.jit
def hidden(x0, x1, W, rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRODUCT: tl.constexpr):
    """x W^T for some rows of W [.., D] -> [BT, rows]"""
    w = tl.load(W + rows[None, :] * D + tl.arange(0, D0)[:, None])
    a = tl.dot(x0, w, input_precision=PRODUCT)
    if D1:
        w = tl.load(W + rows[None, :] * D + D0 + tl.arange(0, D1)[:, None])
        a = tl.dot(x1, w, a, input_precision=PRODUCT)
    return a


@triton.jit
def mixed_head(
    Local, Seen, Logits, Bias, WL, WS, t, h, ok, m_t, l_eps, s_eps, D: tl.constexpr, V: tl.constexpr, SILU: tl.constexpr
):
    """One head of both branches, normed and mixed (mixing.py) -> [BT, V]. Local and Seen [T, D], Logits with rows m_t apart."""
    v = tl.arange(0, V)
    dims = h * V + v
    near, _ = normalised(load_rows(Local, t * D, dims, ok), l_eps, V)
    far, _ = normalised(load_rows(Seen, t * D, dims, ok), s_eps, V)
    logit = load_rows(Logits, t * m_t, dims, ok) + tl.load(Bias + dims).to(tl.float32)[None, :]
    near *= tl.load(WL + v).to(tl.float32)[None, :]
    y = near + tl.sigmoid(logit) * (far * tl.load(WS + v).to(tl.float32)[None, :] - near)
    if SILU:
        y = y * tl.sigmoid(y)
    return y.to(Local.dtype.element_ty)


@triton.jit
def total(X, o, t, dims, ok, D: tl.constexpr):
    """Rows of X plus o, fp32, both rounded as if stored."""
    o = o.to(X.dtype.element_ty).to(tl.float32)
    return (load_rows(X, t * D, dims, ok) + o).to(X.dtype.element_ty).to(tl.float32)


@triton.jit
def swiglu_steps(
    x0, x1, y0, y1, W1, W2, dims0, dims1,
    D0: tl.constexpr, D1: tl.constexpr, I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, PRODUCT: tl.constexpr, STAGES: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """y + (silu(a) b) W2^T with [a, b] = x W1^T, in two parts."""
    D: tl.constexpr = D0 + D1
    step, both = tl.arange(0, BI), tl.arange(0, 2 * BI)
    rows = both % BI + both // BI * I  # of a and of b, in one product
    for first in tl.range(0, I, BI, num_stages=STAGES):
        ab = hidden(x0, x1, W1 + first * D, rows, D, D0, D1, PRODUCT)
        a, b = tl.split(tl.trans(tl.reshape(ab, [BT, 2, BI]), (0, 2, 1)))
        h = (a * tl.sigmoid(a) * b).to(x0.dtype)
        w = tl.load(W2 + first + (dims0[None, :] * I + step[:, None]))
        y0 = tl.dot(h, w, y0, input_precision=PRODUCT)
        if D1:
            w = tl.load(W2 + first + (dims1[None, :] * I + step[:, None]))
            y1 = tl.dot(h, w, y1, input_precision=PRODUCT)
    return y0, y1


@triton.jit(do_not_specialize=("T",))
def mix_and_mlp(
    X, Local, Seen, Logits, Bias, WL, WS, WO, Norm, W1, W2, Y, m_t, T, l_eps, s_eps, eps,
    D0: tl.constexpr, D1: tl.constexpr, I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, PRODUCT: tl.constexpr, STAGES: tl.constexpr,  # noqa: E741
    V: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """s = X + mix(Local, Seen) WO^T; Y = s + (silu(a) b) W2^T with [a, b] = norm(s) W1^T. Tokens [T, D], WO [D, D], W1 [2 I, D], W2 [D, I]."""
    D: tl.constexpr = D0 + D1
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    dims0 = tl.arange(0, D0)
    dims1 = D0 + tl.arange(0, D1 if D1 else D0)
    ok = (t < T)[:, None]
    t = t.to(tl.int64)
    o0 = tl.zeros([BT, D0], tl.float32)
    o1 = tl.zeros([BT, D1 if D1 else 16], tl.float32)
    for h in tl.static_range(D // V):
        mixed = mixed_head(Local, Seen, Logits, Bias, WL, WS, t, h, ok, m_t, l_eps, s_eps, D, V, SILU)
        into = h * V + tl.arange(0, V)[:, None]
        o0 = tl.dot(mixed, tl.load(WO + dims0[None, :] * D + into), o0, input_precision=PRODUCT)
        if D1:
            o1 = tl.dot(mixed, tl.load(WO + dims1[None, :] * D + into), o1, input_precision=PRODUCT)
    s0, s1 = total(X, o0, t, dims0, ok, D), o1
    squares = tl.sum(s0 * s0, 1)
    if D1:
        s1 = total(X, o1, t, dims1, ok, D)
        squares += tl.sum(s1 * s1, 1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    x0 = (s0 * scale * tl.load(Norm + dims0).to(tl.float32)[None, :]).to(X.dtype.element_ty)
    x1 = x0
    if D1:
        x1 = (s1 * scale * tl.load(Norm + dims1).to(tl.float32)[None, :]).to(X.dtype.element_ty)
    y0, y1 = swiglu_steps(x0, x1, s0, s1, W1, W2, dims0, dims1, D0, D1, I, BT, BI, PRODUCT, STAGES)
    save(Y, t * D, dims0, y0, ok)
    if D1:
        save(Y, t * D, dims1, y1, ok)
