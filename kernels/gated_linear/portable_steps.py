"""Chunks that decay too much to be seen from their centre: the recurrence itself, one token after the other, in fp32.

Letters as in portable.py, whose kernels call this. Right for every gate, -inf and gates beside huge ones included; slower, as nothing
here is a product of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.gated_linear.spans import LOG2E, centre_of, load_gate, load_state


@triton.jit
def load_row(base, t, dims, stride_n, stride_d, D):
    """One token's row of [.., N, D], in fp32."""
    return tl.load(base + t * stride_n + dims * stride_d, mask=dims < D, other=0.0).to(tl.float32)


@triton.jit
def load_decay(gates, t, dims, stride_n, stride_d, D, VECTOR: tl.constexpr):
    """-> [BK or 1, 1]"""
    if VECTOR:
        return tl.exp2(load_row(gates, t, dims, stride_n, stride_d, D) * LOG2E)[:, None]
    else:
        return tl.exp2(tl.zeros([1, 1], tl.float32) + tl.load(gates + t * stride_n).to(tl.float32) * LOG2E)


@triton.jit
def plain_state(
    States, at, gates, rows, ok, dims, wide, g_n, g_d, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VECTOR: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """A state as it is, not as seen from the chunk's centre."""
    if HAS_STATES:
        whole = tl.sum(load_gate(gates, rows, ok, dims, g_n, g_d, DK, VECTOR), 0)
        return load_state(States, at, dims, wide, DK, DV).to(tl.float32) * tl.exp2(-centre_of(whole))[:, None]
    else:
        return tl.zeros([BK, BV], tl.float32)


@triton.jit
def step_outputs(
    Q, K, Y, gates, States, at, out, rows, ok, count, dims, wide, q_n, q_d, k_n, k_d, y_n, y_d, g_n, g_d,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr,
    HAS_STATES: tl.constexpr,
):  # fmt: skip
    """Adds to out [C, BV] what one direction gives through these key channels, before the scale."""
    h = plain_state(States, at, gates, rows, ok, dims, wide, g_n, g_d, DK, DV, BK, BV, VECTOR, HAS_STATES)
    for step in tl.range(0, count, num_stages=1, disable_licm=True):
        t = step if LEFT else count - 1 - step
        k, y = load_row(K, t, dims, k_n, k_d, DK), load_row(Y, t, wide, y_n, y_d, DV)
        h = h * load_decay(gates, t, dims, g_n, g_d, DK, VECTOR) + k[:, None] * y[None, :]
        seen = tl.sum(load_row(Q, t, dims, q_n, q_d, DK)[:, None] * h, 0)
        out += tl.where(rows[:, None] == t, seen[None, :], 0.0)
    return out


@triton.jit
def step_gradients(
    Q, K, V, DO, gates, States, Grads, at, dq, dk, dv, z, rows, ok, count, dims, wide,
    q_n, q_d, k_n, k_d, v_n, v_d, do_n, do_d, g_n, g_d, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, LEFT: tl.constexpr,
    HAS_STATES: tl.constexpr,
):  # fmt: skip
    """Adds one direction's gradients through these channels of keys and of values; h is the state, dh its gradient.

    -> dq, dk [C, BK], dv [C, BV], z [C, BK] = q dq - k dk of this direction, and what a gate at the chunk's end would get [BK]
    """
    h = plain_state(States, at, gates, rows, ok, dims, wide, g_n, g_d, DK, DV, BK, BV, VECTOR, HAS_STATES)
    for step in tl.range(0, count, num_stages=1, disable_licm=True):
        t = step if LEFT else count - 1 - step
        k, v = load_row(K, t, dims, k_n, k_d, DK), load_row(V, t, wide, v_n, v_d, DV)
        h = h * load_decay(gates, t, dims, g_n, g_d, DK, VECTOR) + k[:, None] * v[None, :]
        row = tl.sum(h * load_row(DO, t, wide, do_n, do_d, DV)[None, :], 1) * scale
        dq += tl.where(rows[:, None] == t, row[None, :], 0.0)
        z += tl.where(rows[:, None] == t, (load_row(Q, t, dims, q_n, q_d, DK) * row)[None, :], 0.0)
    dh = plain_state(Grads, at, gates, rows, ok, dims, wide, g_n, g_d, DK, DV, BK, BV, VECTOR, HAS_STATES)
    edge = tl.sum(h * dh, 1)
    for step in tl.range(0, count, num_stages=1, disable_licm=True):
        t = count - 1 - step if LEFT else step
        do, v = load_row(DO, t, wide, do_n, do_d, DV), load_row(V, t, wide, v_n, v_d, DV)
        dh += (load_row(Q, t, dims, q_n, q_d, DK) * scale)[:, None] * do[None, :]
        k, row = load_row(K, t, dims, k_n, k_d, DK), tl.sum(dh * v[None, :], 1)
        dk += tl.where(rows[:, None] == t, row[None, :], 0.0)
        z -= tl.where(rows[:, None] == t, (k * row)[None, :], 0.0)
        dv += tl.where(rows[:, None] == t, tl.sum(dh * k[:, None], 0)[None, :], 0.0)
        dh = dh * load_decay(gates, t, dims, g_n, g_d, DK, VECTOR)
    return dq, dk, dv, z, edge
