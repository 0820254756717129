"""The Triton kernel of a gated MLP: residual sum, norm, SwiGLU and both projections in one launch, nothing of which is stored.

Letters: T tokens of the whole batch, D width, I hidden width, BT tokens of a tile, BI hidden channels of a step.

D is taken in two parts, D0 and D1, each a power of two (D1 may be 0): 192 is 128 + 64, without padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.token_mixing.norm_kernels import save


@triton.jit
def part_of_sum(X, Added, t, dims, ok, D: tl.constexpr, POLICY: tl.constexpr):
    """Rows of X + Added, fp32, rounded as a stored sum would be. Another POLICY is another load: the compiler may not keep the first."""
    x = tl.load(X + t[:, None] * D + dims[None, :], mask=ok, other=0.0, eviction_policy=POLICY).to(tl.float32)
    added = tl.load(Added + t[:, None] * D + dims[None, :], mask=ok, other=0.0, eviction_policy=POLICY)
    return (x + added.to(tl.float32)).to(X.dtype.element_ty).to(tl.float32)


@triton.jit
def hidden(x0, x1, W, rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRODUCT: tl.constexpr):
    """x W^T for some rows of W [.., D] -> [BT, rows]"""
    w = tl.load(W + rows[None, :] * D + tl.arange(0, D0)[:, None])
    a = tl.dot(x0, w, input_precision=PRODUCT)
    if D1:
        w = tl.load(W + rows[None, :] * D + D0 + tl.arange(0, D1)[:, None])
        a = tl.dot(x1, w, a, input_precision=PRODUCT)
    return a


@triton.jit(do_not_specialize=("T",))
def gated_mlp_forward(
    X, Added, Norm, W1, W2, Y, T, eps,
    D0: tl.constexpr, D1: tl.constexpr, I: tl.constexpr, BT: tl.constexpr,  # noqa: E741
    BI: tl.constexpr, PRODUCT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """s = X + Added; Y = s + (silu(a) b) W2^T with [a, b] = norm(s) W1^T. X, Added, Y [T, D], W1 [2 I, D], W2 [D, I]."""
    D: tl.constexpr = D0 + D1
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    dims0 = tl.arange(0, D0)
    dims1 = D0 + tl.arange(0, D1 if D1 else D0)
    ok = (t < T)[:, None]
    t = t.to(tl.int64)
    s0 = part_of_sum(X, Added, t, dims0, ok, D, "evict_last")
    squares = tl.sum(s0 * s0, 1)
    if D1:
        s1 = part_of_sum(X, Added, t, dims1, ok, D, "evict_last")
        squares += tl.sum(s1 * s1, 1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    x0 = (s0 * scale * tl.load(Norm + dims0).to(tl.float32)[None, :]).to(X.dtype.element_ty)
    x1 = x0
    if D1:
        x1 = (s1 * scale * tl.load(Norm + dims1).to(tl.float32)[None, :]).to(X.dtype.element_ty)
    y0 = tl.zeros([BT, D0], tl.float32)
    y1 = tl.zeros([BT, D1 if D1 else 16], tl.float32)
    step, both = tl.arange(0, BI), tl.arange(0, 2 * BI)
    rows = both % BI + both // BI * I  # of a and of b, in one product
    for first in tl.range(0, I, BI, num_stages=STAGES):
        ab = hidden(x0, x1, W1 + first * D, rows, D, D0, D1, PRODUCT)
        a, b = tl.split(tl.trans(tl.reshape(ab, [BT, 2, BI]), (0, 2, 1)))
        h = (a * tl.sigmoid(a) * b).to(X.dtype.element_ty)
        w = tl.load(W2 + first + (dims0[None, :] * I + step[:, None]))
        y0 = tl.dot(h, w, y0, input_precision=PRODUCT)
        if D1:
            w = tl.load(W2 + first + (dims1[None, :] * I + step[:, None]))
            y1 = tl.dot(h, w, y1, input_precision=PRODUCT)
    save(Y, t * D, dims0, y0 + part_of_sum(X, Added, t, dims0, ok, D, "evict_first"), ok)
    if D1:
        save(Y, t * D, dims1, y1 + part_of_sum(X, Added, t, dims1, ok, D, "evict_first"), ok)
