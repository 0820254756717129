"""The Triton kernels of the norms: of whole tokens (with the residual sum before it), and of the heads of two branches that are mixed.

Letters: T tokens of the whole batch, D width, H heads, V width of a head; DP and VP are D and V padded to powers of two.

A backward program walks through ``per`` rows and leaves one partial sum of the weights' gradients: the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(X, offset, dims, ok):
    """[ROWS, dims] as fp32, 0 outside."""
    return tl.load(X + offset[:, None] + dims[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def save(X, offset, dims, value, ok):
    tl.store(X + offset[:, None] + dims[None, :], value.to(X.dtype.element_ty), mask=ok)


@triton.jit
def normalised(x, eps, D: tl.constexpr):
    """-> x / rms(x), 1 / rms(x); rows of D."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    return x * scale, scale


@triton.jit
def norm_gradient(unit, scale, grad, D: tl.constexpr):
    """Of x, where unit = x * scale and grad belongs to unit."""
    return scale * (grad - unit * (tl.sum(unit * grad, 1) / D)[:, None])


@triton.jit(do_not_specialize=("T",))
def norm(
    X, Added, Weight, Sum, Y, x_t, a_t, T, eps, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr
):
    """Sum = X + Added (ADD), Y = Weight * Sum / rms(Sum). X [T, D] with rows x_t apart, Added with rows a_t apart."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DP)
    ok = (t < T)[:, None] & (dims < D)[None, :]
    t = t.to(tl.int64)
    x = load_rows(X, t * x_t, dims, ok)
    if ADD:
        x += load_rows(Added, t * a_t, dims, ok)
        save(Sum, t * D, dims, x, ok)
        x = x.to(Sum.dtype.element_ty).to(tl.float32)
    unit, _ = normalised(x, eps, D)
    weight = tl.load(Weight + dims, mask=dims < D, other=0.0).to(tl.float32)
    save(Y, t * D, dims, unit * weight[None, :], ok)


@triton.jit(do_not_specialize=("T", "per"))
def norm_backward(
    X, Weight, DY, DSum, DX, DAdded, Sums, x_t, T, per, eps,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, HAS_SUM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """X is what was normed. DX = gradient through the norm + DSum (HAS_SUM), and again in Added's dtype (ADD). Sums [programs, D]."""
    part = tl.program_id(0)
    dims = tl.arange(0, DP)
    weight = tl.load(Weight + dims, mask=dims < D, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    end = tl.minimum(part * per + per, T)
    for start in range(part * per, end, ROWS):
        t = start + tl.arange(0, ROWS)
        ok = (t < end)[:, None] & (dims < D)[None, :]
        t = t.to(tl.int64)
        unit, scale = normalised(load_rows(X, t * x_t, dims, ok), eps, D)
        grad = load_rows(DY, t * D, dims, ok)
        sums += grad * unit
        grad = norm_gradient(unit, scale, grad * weight[None, :], D)
        if HAS_SUM:
            grad += load_rows(DSum, t * D, dims, ok)
        save(DX, t * D, dims, grad, ok)
        if ADD:
            save(DAdded, t * D, dims, grad, ok)
    tl.store(Sums + part.to(tl.int64) * D + dims, tl.sum(sums, 0), mask=dims < D)


@triton.jit
def mix_inputs(
    Local, Seen, Logits, Bias, WL, WS, t, h, dims, ok, N, l_b, l_n, s_b, s_h, s_n, m_b, m_n, l_eps, s_eps, V: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Rows are tokens of one head. -> both branches over their rms, the two factors, their weights, the mix, and the rows' (b, n)."""
    b, n = (t // N).to(tl.int64), (t % N).to(tl.int64)
    near, near_scale = normalised(load_rows(Local + h * V, b * l_b + n * l_n, dims, ok), l_eps, V)
    far, far_scale = normalised(load_rows(Seen + h.to(tl.int64) * s_h, b * s_b + n * s_n, dims, ok), s_eps, V)
    logit = load_rows(Logits + h * V, b * m_b + n * m_n, dims, ok)
    if HAS_BIAS:
        logit += tl.load(Bias + h * V + dims, mask=dims < V, other=0.0).to(tl.float32)[None, :]
    wl = tl.load(WL + dims, mask=dims < V, other=0.0).to(tl.float32)[None, :]
    ws = tl.load(WS + dims, mask=dims < V, other=0.0).to(tl.float32)[None, :]
    return near, far, near_scale, far_scale, wl, ws, tl.sigmoid(logit), b, n


@triton.jit(do_not_specialize=("T", "N"))
def mix(
    Local, Seen, Logits, Bias, WL, WS, Y, l_b, l_n, s_b, s_h, s_n, m_b, m_n, T, N, l_eps, s_eps,
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % H
    t = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, VP)
    ok = (t < T)[:, None] & (dims < V)[None, :]
    near, far, _, _, wl, ws, m, _, _ = mix_inputs(
        Local,
        Seen,
        Logits,
        Bias,
        WL,
        WS,
        t,
        h,
        dims,
        ok,
        N,
        l_b,
        l_n,
        s_b,
        s_h,
        s_n,
        m_b,
        m_n,
        l_eps,
        s_eps,
        V,
        HAS_BIAS,
    )
    near *= wl
    y = near + m * (far * ws - near)
    if SILU:
        y = y * tl.sigmoid(y)
    save(Y + h * V, t.to(tl.int64) * (H * V), dims, y, ok)


@triton.jit(do_not_specialize=("T", "N", "per"))
def mix_backward(
    Local, Seen, Logits, Bias, WL, WS, DY, DLocal, DSeen, DLogits, Sums,
    l_b, l_n, s_b, s_h, s_n, m_b, m_n, d_b, d_h, d_n, T, N, per, l_eps, s_eps,
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """DY, DLocal and DLogits [B, N, H V]; DSeen with strides d_b, d_h, d_n; Sums [3, parts, H, V]: of both weights and of the bias."""
    h, part = tl.program_id(0) % H, tl.program_id(0) // H
    dims = tl.arange(0, VP)
    sums_l, sums_s, sums_b = (
        tl.zeros([ROWS, VP], tl.float32),
        tl.zeros([ROWS, VP], tl.float32),
        tl.zeros([ROWS, VP], tl.float32),
    )
    end = tl.minimum(part * per + per, T)
    for start in range(part * per, end, ROWS):
        t = start + tl.arange(0, ROWS)
        ok = (t < end)[:, None] & (dims < V)[None, :]
        near, far, near_scale, far_scale, wl, ws, m, b, n = mix_inputs(
            Local,
            Seen,
            Logits,
            Bias,
            WL,
            WS,
            t,
            h,
            dims,
            ok,
            N,
            l_b,
            l_n,
            s_b,
            s_h,
            s_n,
            m_b,
            m_n,
            l_eps,
            s_eps,
            V,
            HAS_BIAS,
        )
        at = t.to(tl.int64) * (H * V)
        grad = load_rows(DY + h * V, at, dims, ok)
        apart = far * ws - near * wl
        if SILU:
            y = near * wl + m * apart
            gate = tl.sigmoid(y)
            grad *= gate * (1.0 + y * (1.0 - gate))
        to_logit = grad * apart * m * (1.0 - m)
        sums_b += to_logit
        save(DLogits + h * V, at, dims, to_logit, ok)
        to_near, to_far = grad * (1.0 - m), grad * m
        sums_l += to_near * near
        sums_s += to_far * far
        save(DLocal + h * V, at, dims, norm_gradient(near, near_scale, to_near * wl, V), ok)
        save(DSeen + h.to(tl.int64) * d_h, b * d_b + n * d_n, dims, norm_gradient(far, far_scale, to_far * ws, V), ok)
    place, lead = Sums + tl.program_id(0) * V + dims, tl.num_programs(0) * V
    tl.store(place, tl.sum(sums_l, 0), mask=dims < V)
    tl.store(place + lead, tl.sum(sums_s, 0), mask=dims < V)
    tl.store(place + 2 * lead, tl.sum(sums_b, 0), mask=dims < V)
