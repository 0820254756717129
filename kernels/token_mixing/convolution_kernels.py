"""The Triton kernels of the depth-wise convolution on tokens.

Letters: B batch, N = height * width tokens, D channels, K kernel size, R rows of a strip, BW columns and BD channels of a tile.

* A program walks down a strip. Every row of it is loaded K times, moved sideways, and added to the K rows of output that see it, which wait
  in registers: K loads an output instead of K * K.
* The gradient of the input is the same convolution with the taps in reverse.
"""

# Triton has no starred tuples, and mypy counts a tuple's entries.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_row(waiting, weights, base, row, column, inside, width, x_n, wide, K: tl.constexpr, REVERSED: tl.constexpr):
    """The K rows of output that see this row of input, with what it adds to them; the first is then complete."""
    moved = ()
    for j in tl.static_range(K):
        there = column + (j - K // 2)
        ok = (inside & (there >= 0) & (there < width))[:, None] & wide
        moved = moved + (tl.load(base + (row * width + (j - K // 2)) * x_n, mask=ok, other=0.0).to(tl.float32),)
    seen = ()
    for i in tl.static_range(K):
        total = waiting[i]
        for j in tl.static_range(K):
            total += moved[j] * weights[i * K + K - 1 - j if REVERSED else (K - 1 - i) * K + j]
        seen = seen + (total,)
    return seen


@triton.jit(do_not_specialize=("height", "width"))
def convolve(
    X, W, Bias, Grad, Y, x_b, x_n, height, width,
    D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GRAD: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Y = act(X * W + Bias); or (HAS_GRAD) Grad times the activation's derivative there. X [B, N, D], W [D, K * K], Y and Grad [B N, D]."""
    tiles: tl.constexpr = (D + BD - 1) // BD
    across, down = tl.cdiv(width, BW), tl.cdiv(height, R)
    at = tl.program_id(0) // tiles
    first = at // across % down * R
    b = (at // (across * down)).to(tl.int64)
    column = at % across * BW + tl.arange(0, BW)
    dims = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    wide = (dims < D)[None, :]
    base = X + b * x_b + column[:, None] * x_n + dims[None, :]
    place = (b * height * width + column)[:, None] * D + dims[None, :]
    weights = ()
    for tap in tl.static_range(K * K):
        weights = weights + (tl.load(W + dims[None, :] * (K * K) + tap, mask=wide, other=0.0).to(tl.float32),)
    waiting = ()
    for _ in tl.static_range(K):
        waiting = waiting + (tl.zeros([BW, BD], tl.float32),)
    for r in tl.static_range(R + K - 1):
        row = first + r - K // 2
        seen = add_row(waiting, weights, base, row, column, (row >= 0) & (row < height), width, x_n, wide, K, REVERSED)
        if r >= K - 1:
            out = row - K // 2
            ok = ((out < height) & (column < width))[:, None] & wide
            finish(seen[0], Bias, Grad, Y, place + out * width * D, dims, ok, wide, SILU, HAS_BIAS, HAS_GRAD)
        waiting = ()
        for i in tl.static_range(1, K):
            waiting = waiting + (seen[i],)
        waiting = waiting + (tl.zeros([BW, BD], tl.float32),)


@triton.jit
def finish(
    total, Bias, Grad, Y, place, dims, ok, wide, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD: tl.constexpr
):  # fmt: skip
    """Bias, activation (or its derivative times Grad), store."""
    if HAS_BIAS:
        total += tl.load(Bias + dims[None, :], mask=wide, other=0.0).to(tl.float32)
    if HAS_GRAD:
        gate = tl.sigmoid(total)
        total = tl.load(Grad + place, mask=ok, other=0.0).to(tl.float32) * gate * (1.0 + total * (1.0 - gate))
    elif SILU:
        total = total * tl.sigmoid(total)
    tl.store(Y + place, total.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=("total", "N", "height", "width", "per"))
def weight_gradients(
    X, Grad, Sums, BiasSums, x_b, x_n, total, N, height, width, per,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Sums [parts, D, K * K] and BiasSums [parts, D] over ``per`` tokens each. A program takes ROWS rows of the taps."""
    tiles: tl.constexpr = (D + BD - 1) // BD
    groups: tl.constexpr = K // ROWS
    part = tl.program_id(0) // (tiles * groups)
    dims = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    first = tl.program_id(0) // tiles % groups * ROWS
    wide = dims < D
    sums = ()
    for _ in tl.static_range(ROWS * K):
        sums = sums + (tl.zeros([BP, BD], tl.float32),)
    every = tl.zeros([BP, BD], tl.float32)
    end = tl.minimum(part * per + per, total)
    for start in range(part * per, end, BP):
        p = start + tl.arange(0, BP)
        n = p % N
        row, column = n // width, n % width
        base = X + ((p // N).to(tl.int64) * x_b + n.to(tl.int64) * x_n)[:, None] + dims[None, :]
        grad = tl.load(
            Grad + p.to(tl.int64)[:, None] * D + dims[None, :], mask=(p < end)[:, None] & wide[None, :], other=0.0
        ).to(tl.float32)
        every += grad
        added = ()
        for i in tl.static_range(ROWS):
            for j in tl.static_range(K):
                y, x = row + (first + i - K // 2), column + (j - K // 2)
                ok = (p < end) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                step = ((first + i - K // 2) * width + (j - K // 2)) * x_n
                value = tl.load(base + step, mask=ok[:, None] & wide[None, :], other=0.0)
                added = added + (sums[i * K + j] + grad * value.to(tl.float32),)
        sums = added
    for i in tl.static_range(ROWS * K):
        to = Sums + (part.to(tl.int64) * D + dims) * (K * K) + first * K + i
        tl.store(to, tl.sum(sums[i], 0), mask=wide)
    if HAS_BIAS and first == 0:
        tl.store(BiasSums + part.to(tl.int64) * D + dims, tl.sum(every, 0), mask=wide)
