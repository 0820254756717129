"""Parts of the gated kernels: loading tiles, sums of gates over a chunk, and where a chunk is seen from (told in portable.py).

Letters as in portable.py. LEFT: the direction whose states come from the left; the other is its mirror image.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(-192.0)  # factors up to 2^96: with products of inputs up to 2^20, sums over a chunk stay in range
SCALAR_LIMIT = tl.constexpr(
    -4096.0
)  # one gate a head, 16-bit inputs: differences of fp32 sums are as exact as these down to here


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
def load_state(States, at, dims, wide, DK: tl.constexpr, DV: tl.constexpr):
    """at: number of the [K, V] state. -> [BK, BV]"""
    place = States + at.to(tl.int64) * (DK * DV) + dims[:, None] * DV + wide[None, :]
    return tl.load(place, mask=(dims < DK)[:, None] & (wide < DV)[None, :], other=0.0)


@triton.jit
def running_sum(x, REVERSE: tl.constexpr):
    """Cumulative sum over rows. [C, 1] goes as a vector: triton 3.6 fails to compile the scan of a single column."""
    if x.shape[1] == 1:
        return tl.cumsum(tl.sum(x, 1), 0, reverse=REVERSE)[:, None]
    else:
        return tl.cumsum(x, 0, reverse=REVERSE)


@triton.jit
def centre_of(whole):
    """Where a chunk is seen from: half its log2 decay, bounded so that a state survives the way there."""
    return tl.maximum(whole, LIMIT) * 0.5


@triton.jit
def limit_of(dtype: tl.constexpr, VECTOR: tl.constexpr):
    """The log2 decay across a chunk below which it is read one token after the other."""
    if VECTOR or dtype == tl.float32:
        return LIMIT
    else:
        return SCALAR_LIMIT


@triton.jit
def spans(gates, rows, ok, dims, g_n, g_d, DK: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr):
    """LEFT: states come from the left. -> (upto [C, BK or 1], whole [BK or 1])"""
    gate = load_gate(gates, rows, ok, dims, g_n, g_d, DK, VECTOR)
    return running_sum(gate, not LEFT), tl.sum(gate, 0)


@triton.jit
def in_order(rows, LEFT: tl.constexpr):
    """[query, key]: pairs that this direction reads."""
    if LEFT:
        return rows[:, None] >= rows[None, :]
    else:
        return rows[:, None] <= rows[None, :]


@triton.jit
def pair_decays(upto, rows, LEFT: tl.constexpr):
    """One gate a head: the decay between every pair [C, C], 0 where this direction does not read it."""
    return tl.where(in_order(rows, LEFT), tl.exp2(upto - tl.trans(upto)), 0.0)
