"""Gated and plain linear attention on a GPU: outputs and every gradient against fp64, few compiled variants, long sequences.

Some versions of Triton compile kernels of this kind wrongly for Hopper (scalar gates, backward); that is what the gradients check.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.gated_linear import (
    bidirectional_gated_linear_attention,
    choose,
    gated_linear_attention,
    linear_attention,
)

pytestmark = pytest.mark.gpu

BOUND = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}  # of the relative error
LENGTHS = (1, 49, 196, 1000)
CASES = [
    (torch.bfloat16, 32, 64, "vector", "both"),
    (torch.bfloat16, 64, 64, "vector", "forward"),
    (torch.bfloat16, 64, 64, "scalar", "forward"),
    (torch.bfloat16, 64, 64, "scalar", "both"),
    (torch.float16, 72, 80, "vector", "reverse"),
    (torch.float32, 32, 64, "vector", "both"),
    (torch.float32, 64, 64, "scalar", "reverse"),
]


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))


def draw(n: int, keys: int, values: int, gate: str, dtype: torch.dtype, temper: float = 4.0) -> list[Tensor]:
    torch.manual_seed(n)
    q, k, v = (torch.randn(2, n, 3, w, device="cuda", dtype=dtype).transpose(1, 2) for w in (keys, keys, values))
    shape = (2, 3, n, keys) if gate == "vector" else (2, 3, n)
    return [q, k, v, *(F.logsigmoid(torch.randn(shape, device="cuda")) / temper for _ in range(2))]


def call(x: list[Tensor], direction: str, state: Tensor | None, implementation: str) -> list[Tensor]:
    if direction == "both":
        return [bidirectional_gated_linear_attention(*x, implementation=implementation)]
    extra = {"initial_state": state, "return_state": True, "implementation": implementation}
    return list(gated_linear_attention(*x[:4], reverse=direction == "reverse", **extra))


def check(x: list[Tensor], direction: str, bound: float) -> None:
    state = torch.randn(2, 3, x[0].shape[-1], x[2].shape[-1], device="cuda") if direction != "both" else None
    leaves = x if direction == "both" else [*x[:4], state]
    results = []
    for to, name in ((None, "triton"), (torch.float64, "torch")):
        own = [(t if to is None else t.to(to)).detach().requires_grad_() for t in leaves]
        outs = call(own, direction, None if state is None else own[-1], name)
        weights = [
            torch.randn(o.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(i))
            .to(x[0].dtype)
            .to(o.dtype)
            for i, o in enumerate(outs)
        ]
        results.append([*outs, *torch.autograd.grad(outs, own, weights)])
    errors = [relative(got, want) for got, want in zip(*results, strict=True)]
    assert all(got.isfinite().all() for got in results[0]) and max(errors) < bound, [f"{e:.1e}" for e in errors]


@pytest.mark.parametrize(
    ("dtype", "keys", "values", "gate", "direction"), CASES, ids=lambda x: str(x).replace("torch.", "")
)
def test_outputs_and_gradients_equal_those_in_double_precision(dtype, keys, values, gate, direction):
    for n in LENGTHS:
        if n > 1:  # a single token's gates have no gradient but rounding
            check(draw(n, keys, values, gate, dtype), direction, BOUND[dtype])
        else:
            x = draw(n, keys, values, gate, dtype)
            got, want = (
                call([t.to(to) for t in x], direction, None, name)[0]
                for to, name in ((dtype, "triton"), (torch.float64, "torch"))
            )
            assert relative(got, want) < BOUND[dtype]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_extreme_gates_stay_finite_and_right(gate, direction):
    x = draw(500, 32, 64, gate, torch.bfloat16)
    x[3:] = [torch.randn(g.shape, device="cuda").sign().clamp(max=0) * 1e5 - 0.01 for g in x[3:]]
    check(x, direction, BOUND[torch.bfloat16])


def test_a_long_sequence_equals_its_parts():
    q, k, v, a, _ = draw(40000, 64, 64, "vector", torch.bfloat16)
    whole = gated_linear_attention(q, k, v, a)
    first, state = gated_linear_attention(*(t[:, :, :12345] for t in (q, k, v, a)), return_state=True)
    second = gated_linear_attention(*(t[:, :, 12345:] for t in (q, k, v, a)), initial_state=state)
    assert choose(q, v).name == "triton"
    assert relative(torch.cat((first, second), 2), whole) < BOUND[torch.bfloat16]


def test_thirty_runs_are_bit_identical():
    x = [t.requires_grad_() for t in draw(700, 32, 64, "vector", torch.bfloat16)]
    runs = []
    for _ in range(30):
        out = bidirectional_gated_linear_attention(*x)
        runs.append([out, *torch.autograd.grad(out.float().sum(), x)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_no_variant_is_compiled_for_a_second_length():
    from foveal.kernels.gated_linear.portable import chunk_outputs

    count = lambda: sum(len(cache[0]) for cache in chunk_outputs.device_caches.values())  # noqa: E731
    for n in (500, 520):
        bidirectional_gated_linear_attention(*draw(n, 32, 64, "vector", torch.bfloat16))
    before = count()
    for n in range(530, 600, 10):
        bidirectional_gated_linear_attention(*draw(n, 32, 64, "vector", torch.bfloat16))
    assert count() == before


@pytest.mark.parametrize("normalisation", ["division", "subtraction"])
@pytest.mark.parametrize("dtype", BOUND, ids=lambda x: str(x).replace("torch.", ""))
def test_linear_attention_equals_double_precision(dtype, normalisation):
    for n in (49, 1280):
        q, k, v, _, _ = draw(n, 96, 96, "scalar", dtype)
        gates = [torch.rand(1, 3, n, 1, device="cuda") + 0.5 for _ in range(2)]
        weight = torch.randn(v.shape, device="cuda").to(dtype)
        results = []
        for to, name in ((None, "triton"), (torch.float64, "torch")):
            x = [(t if to is None else t.to(to)).detach().requires_grad_() for t in (q, k, v, *gates)]
            out = linear_attention(
                *x[:3], normalisation=normalisation, key_gate=x[3], value_gate=x[4], implementation=name
            )
            results.append([out, *torch.autograd.grad(out, x, weight.to(out.dtype))])
        errors = [relative(got, want) for got, want in zip(*results, strict=True)]
        assert max(errors) < 2 * BOUND[dtype], [f"{e:.1e}" for e in errors]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("n", [5, 200, 1280, 5120])
@pytest.mark.parametrize("width", [72, 96, 128])
def test_heads_of_a_projection_with_something_added_equal_double_precision(width, n, gated):
    torch.manual_seed(n)
    heads = 4
    q, k, v = (
        torch.randn(2, n, 3 * heads * width, device="cuda")
        .bfloat16()
        .unflatten(-1, (3, heads, width))
        .permute(2, 0, 3, 1, 4)
    )
    added = torch.randn(2, n - n // 5, heads, width, device="cuda").bfloat16().transpose(1, 2)
    gates = [torch.rand(1, heads, n, 1, device="cuda") + 0.5 if gated else None for _ in range(2)]
    wide = [None if x is None else x.double() for x in (q, k, v, *gates, added)]
    want = linear_attention(*wide[:3], key_gate=wide[3], value_gate=wide[4], added=wide[5], implementation="torch")
    found = [linear_attention(q, k, v, key_gate=gates[0], value_gate=gates[1], added=added) for _ in range(3)]
    assert relative(found[0], want) < 4e-3 and found[0].transpose(1, 2).is_contiguous()
    assert all(torch.equal(x, found[0]) for x in found[1:])


def test_compiled_call_equals_eager_call():
    x = [t.requires_grad_() for t in draw(300, 32, 64, "vector", torch.bfloat16)]
    compiled = torch.compile(lambda *t: bidirectional_gated_linear_attention(*t) * 2, fullgraph=True)
    out, want = compiled(*x), bidirectional_gated_linear_attention(*x) * 2
    torch.testing.assert_close(out, want)
    for a, b in zip(torch.autograd.grad(out.sum(), x), torch.autograd.grad(want.sum(), x), strict=True):
        torch.testing.assert_close(a, b)
