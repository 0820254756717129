"""Laws of gated linear attention, for every implementation that runs without a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.gated_linear import (
    bidirectional_gated_linear_attention,
    choose,
    gated_linear_attention,
    gated_linear_step,
    support_table,
)
from foveal.kernels.gated_linear.chunked import chunked
from foveal.kernels.gated_linear.reference import both_recurrences

DIRECTIONS = ("forward", "reverse", "both")
GATES = ("vector", "scalar")


def inputs(
    n: int,
    keys: int = 8,
    values: int = 6,
    gate: str = "vector",
    temper: float = 1.0,
    dtype=torch.float64,
    heads: int = 2,
):
    """q, k, v, and two gates, drawn anew for every shape."""
    torch.manual_seed(n * 31 + keys)
    q, k = torch.randn(2, heads, n, keys, dtype=dtype), torch.randn(2, heads, n, keys, dtype=dtype)
    v = torch.randn(2, heads, n, values, dtype=dtype)
    width = keys if gate == "vector" else 1
    gates = [F.logsigmoid(torch.randn(2, heads, n, width, dtype=torch.float64)).to(dtype) / temper for _ in range(2)]
    return q, k, v, *(g if gate == "vector" else g[..., 0] for g in gates)


def call(direction: str, q, k, v, a, b, **extra) -> Tensor:
    if direction == "both":
        return bidirectional_gated_linear_attention(q, k, v, a, b, **extra)
    return gated_linear_attention(q, k, v, a, reverse=direction == "reverse", **extra)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 100, 257])
def test_chunks_equal_the_recurrence(n, direction, gate):
    for keys, values in ((4, 4), (60, 100)):
        x = inputs(n, keys, values, gate)
        want = call(direction, *x, implementation="reference")
        torch.testing.assert_close(call(direction, *x), want, atol=1e-12, rtol=1e-12)
        assert relative(call(direction, *(t.float() for t in x)), want) < 2e-6


@pytest.mark.parametrize("chunk", [1, 2, 16, 32, 128])
def test_the_chunk_does_not_matter(chunk):
    q, k, v, a, b = inputs(100)
    want = both_recurrences(q, k, v, a, b, 0.5, None)
    for got, expected in zip(chunked(q, k, v, a, b, 0.5, None, chunk), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_both_directions_equal_two_calls(gate, implementation):
    q, k, v, a, b = inputs(70, gate=gate)
    parts = [
        gated_linear_attention(q, k, v, g, reverse=i == 1, scale=0.3, implementation=implementation)
        for i, g in enumerate((a, b))
    ]
    both = bidirectional_gated_linear_attention(q, k, v, a, b, scale=0.3, implementation=implementation)
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_reverse_is_the_flip_of_forward():
    q, k, v, a, b = inputs(70)
    flipped = [t.flip(2) for t in (q, k, v, a)]
    torch.testing.assert_close(
        gated_linear_attention(q, k, v, a, reverse=True), gated_linear_attention(*flipped).flip(2)
    )
    torch.testing.assert_close(
        bidirectional_gated_linear_attention(*(t.flip(2) for t in (q, k, v, b, a))),
        bidirectional_gated_linear_attention(q, k, v, a, b).flip(2),
    )


@pytest.mark.parametrize("cut", [1, 30, 64, 69])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_handing_on_the_state_equals_the_whole(reverse, cut):
    q, k, v, a, _ = inputs(70)
    start = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    whole, last = gated_linear_attention(q, k, v, a, initial_state=start, reverse=reverse, return_state=True)
    spans = [slice(cut, None), slice(0, cut)] if reverse else [slice(0, cut), slice(cut, None)]
    state, outs = start, {}
    for span in spans:
        outs[span.start], state = gated_linear_attention(
            *(t[:, :, span] for t in (q, k, v, a)), initial_state=state, reverse=reverse, return_state=True
        )
    torch.testing.assert_close(torch.cat([outs[s] for s in sorted(outs)], 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("gate", GATES)
def test_steps_equal_the_whole(gate):
    q, k, v, a, _ = inputs(20, gate=gate)
    state = torch.zeros(2, 2, 8, 6, dtype=torch.float64)
    steps = []
    for t in range(20):
        out, state = gated_linear_step(q[:, :, t], k[:, :, t], v[:, :, t], a[:, :, t], state)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 2), gated_linear_attention(q, k, v, a))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_scalar_gate_equals_equal_channels(direction):
    q, k, v, a, b = inputs(70, gate="scalar")
    wide = [g[..., None].expand(-1, -1, -1, 8) for g in (a, b)]
    torch.testing.assert_close(call(direction, q, k, v, a, b), call(direction, q, k, v, *wide))


def test_gate_zero_is_plain_linear_attention():
    q, k, v, a, _ = inputs(70)
    zero = torch.zeros_like(a)
    scores = q @ k.mT * 8**-0.5
    torch.testing.assert_close(gated_linear_attention(q, k, v, zero), scores.tril() @ v)
    twice = scores + torch.diag_embed(scores.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(bidirectional_gated_linear_attention(q, k, v, zero, zero), twice @ v)


@pytest.mark.parametrize("shut", [-1e9, -torch.inf], ids=["-1e9", "-inf"])
def test_a_shut_gate_leaves_only_the_token_itself(shut):
    q, k, v, a, _ = inputs(70)
    gate = torch.full_like(a, shut)
    own = (q * k).sum(-1, keepdim=True) * v * 8**-0.5
    torch.testing.assert_close(gated_linear_attention(q, k, v, gate), own)
    torch.testing.assert_close(bidirectional_gated_linear_attention(q, k, v, gate, gate), 2 * own)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temper", [0.02, 0.1, 16.0])
def test_extreme_gates_stay_exact_in_fp32(temper, direction):
    q, k, v, _, _ = inputs(130, dtype=torch.float32)
    gates = [
        F.logsigmoid(torch.randn(q.shape, generator=torch.Generator().manual_seed(s)) * 50).float() / temper
        for s in (1, 2)
    ]
    want = call(direction, *(t.double() for t in (q, k, v, *gates)), implementation="reference")
    assert relative(call(direction, q, k, v, *gates), want) < 2e-6


def test_one_huge_gate_does_not_blur_the_gates_beside_it():
    q, k, v, a, _ = inputs(64, dtype=torch.float32, temper=16)
    a[:, :, 3] = -1e6
    want = gated_linear_attention(*(t.double() for t in (q, k, v, a)), implementation="reference")
    assert relative(gated_linear_attention(q, k, v, a), want) < 1e-6


@pytest.mark.parametrize("gate", GATES)
def test_gradients_equal_finite_differences(gate):
    q, k, v, a, b = (t.requires_grad_() for t in inputs(11, 3, 2, gate, heads=1))
    state = torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: gated_linear_attention(*x[:4], initial_state=x[4], return_state=True), (q, k, v, a, state)
    )
    assert torch.autograd.gradcheck(bidirectional_gated_linear_attention, (q, k, v, a, b))


def test_extreme_gates_have_finite_gradients():
    x = [t.requires_grad_() for t in inputs(70, temper=0.001)]
    grads = torch.autograd.grad(bidirectional_gated_linear_attention(*x).sum(), x)
    assert all(g.isfinite().all() for g in grads)


def test_attention_is_linear_in_values():
    q, k, v, a, _ = inputs(70)
    w = torch.randn_like(v)
    torch.testing.assert_close(
        gated_linear_attention(q, k, 3 * v + w, a),
        3 * gated_linear_attention(q, k, v, a) + gated_linear_attention(q, k, w, a),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_costs_one_rounding(dtype):
    x = [t.to(dtype) for t in inputs(200)]
    want = bidirectional_gated_linear_attention(*(t.double() for t in x), implementation="reference")
    got = bidirectional_gated_linear_attention(*x)
    assert got.dtype == dtype and relative(got, want) < torch.finfo(dtype).eps / 2


def test_the_output_keeps_the_strides_of_values():
    x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(70)]
    assert bidirectional_gated_linear_attention(*x).stride() == x[2].stride()
    torch.testing.assert_close(
        bidirectional_gated_linear_attention(*x), bidirectional_gated_linear_attention(*(t.contiguous() for t in x))
    )


def test_no_tokens_give_no_output_and_a_copy_of_the_state():
    q, k, v, a, _ = (t[:, :, :0] for t in inputs(3))
    state = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    out, last = gated_linear_attention(q, k, v, a, initial_state=state, return_state=True)
    assert out.shape == v.shape and torch.equal(last, state) and last is not state


def test_compiled_call_equals_eager_call_in_one_graph():
    x = inputs(70)
    compiled = torch.compile(
        lambda *t: bidirectional_gated_linear_attention(*t) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*x), bidirectional_gated_linear_attention(*x) * 2)


def test_the_choice_is_named_with_its_reasons():
    q, _, v, _, _ = inputs(4, dtype=torch.float32)
    assert "triton skipped: it runs on cuda, q is on cpu" in str(choose(q, v)) and choose(q, v).name == "torch"
    assert "| `triton` | cuda" in support_table()


X = inputs(5)
MISFITS = {
    "k": (lambda: gated_linear_attention(X[0], X[1][:, :, :4], X[2], X[3]), ValueError, r"k needs q's shape"),
    "gate": (lambda: gated_linear_attention(*X[:3], X[3][..., :3]), ValueError, r"a gate per key channel.*one per head"),
    "state": (lambda: gated_linear_attention(*X[:4], initial_state=torch.zeros(2, 2, 8, 6)), ValueError, r"torch.float64 on cpu is needed"),
    "integers": (lambda: gated_linear_attention(*(t.int() for t in X[:4])), TypeError, r"needs floating-point tensors"),
    "growing": (lambda: gated_linear_attention(*X[:3], X[3] + 9, validate=True), ValueError, r"160 of 160 entries above 0"),
    "name": (lambda: gated_linear_attention(*X[:4], implementation="tritn"), ValueError, r"did you mean 'triton'"),
    "kinds": (lambda: bidirectional_gated_linear_attention(*X[:4], X[4][..., 0]), ValueError, r"one kind of gate"),
    "dtype": (lambda: gated_linear_attention(*X[:4], implementation="triton"), ValueError, r"dtype float64 is none of"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused_in_a_sentence(case):
    make, error, says = MISFITS[case]
    with pytest.raises(error, match=says):
        make()
