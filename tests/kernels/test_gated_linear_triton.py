"""The Triton kernels of gated and plain linear attention, run by Triton's interpreter, against the definition in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.gated_linear import bidirectional_gated_linear_attention, gated_linear_attention, linear_attention
from foveal.kernels.gated_linear.spans import LIMIT
from foveal.kernels.gated_linear.tiles import Tile

BOUND = {torch.float32: 1e-5, torch.float16: 1e-3}
KEYS, VALUES = 20, 24


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens: a few dozen tokens then have all that long sequences have. Width 20 in tiles of 16 pads the second."""
    from foveal.kernels.gated_linear import portable_call

    monkeypatch.setattr(portable_call, "tile_for", lambda *_, **__: Tile(16, 16, 16, 4))


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=0.1))


def draw(n: int, gate: str, dtype: torch.dtype, temper: float = 0.7, heads: int = 1) -> list[Tensor]:
    torch.manual_seed(n)
    shape = (1, heads, n)
    q, k = torch.randn(*shape, KEYS, dtype=dtype), torch.randn(*shape, KEYS, dtype=dtype)
    v = torch.randn(1, n, heads, VALUES, dtype=dtype).transpose(1, 2)  # rows of a token together, as from a projection
    return [
        q,
        k,
        v,
        *(F.logsigmoid(torch.randn(*shape, *((KEYS,) if gate == "vector" else ()))) / temper for _ in range(2)),
    ]


def run(x: list[Tensor], direction: str, state: Tensor | None, implementation: str) -> list[Tensor]:
    if direction == "both":
        return [bidirectional_gated_linear_attention(*x, scale=0.3, implementation=implementation)]
    return list(
        gated_linear_attention(
            *x[:4],
            scale=0.3,
            initial_state=state,
            reverse=direction == "reverse",
            return_state=True,
            implementation=implementation,
        )
    )


def compare(x: list[Tensor], direction: str, bound: float, with_state: bool = True) -> None:
    """Outputs, last states and every gradient."""
    state = torch.randn(1, 1, KEYS, VALUES) if with_state and direction != "both" else None
    leaves = [t for t in (*x[: 5 if direction == "both" else 4], state) if t is not None]
    results = []
    for dtype, implementation in ((None, "triton"), (torch.float64, "torch")):
        own = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in leaves]
        first = own[-1] if state is not None else None
        outs = run([*own[: len(own) - (state is not None)]], direction, first, implementation)
        weights = [
            torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o.dtype) for i, o in enumerate(outs)
        ]
        results.append([*outs, *torch.autograd.grad(outs, own, weights)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.isfinite().all() and relative(got, want) < bound, f"result {i}: {relative(got, want):.1e}"


@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16"])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_outputs_states_and_gradients_equal_the_definition(direction, gate, dtype, small_chunks):
    compare(draw(37, gate, dtype), direction, BOUND[dtype])


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_one_chunk_without_states(n, gate, small_chunks):
    compare(draw(n, gate, torch.float32), "both", BOUND[torch.float32])


def test_shipped_tiles_equal_the_definition():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 80, 32).half(), torch.randn(1, 1, 80, 32).half(), torch.randn(1, 1, 80, 64).half()
    a, b = (F.logsigmoid(torch.randn(1, 1, 80, 32)) / 16 for _ in range(2))
    x = [t.requires_grad_() for t in (q, k, v, a, b)]
    out = bidirectional_gated_linear_attention(*x, implementation="triton")
    wide = [t.detach().double().requires_grad_() for t in x]
    want = bidirectional_gated_linear_attention(*wide)
    grads = torch.autograd.grad(out, x, torch.ones_like(out)), torch.autograd.grad(want, wide, torch.ones_like(want))
    assert max(relative(g, w) for g, w in zip((out, *grads[0]), (want, *grads[1]), strict=True)) < BOUND[torch.float16]


@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_extreme_gates_stay_exact(gate, small_chunks):
    x = draw(21, gate, torch.float32)
    x[3:] = [torch.randn(x[3].shape).sign().clamp(max=0) * 1e5 - 0.01 for _ in range(2)]
    compare(x, "both", BOUND[torch.float32])


@pytest.mark.parametrize("decay", [-11.5, -12.5], ids=["seen from the centre", "step by step"])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_chunks_on_either_side_of_the_limit_are_exact(direction, decay, small_chunks):
    assert 16 * -11.5 > LIMIT.value > 16 * -12.5
    x = draw(20, "vector", torch.float32)
    x[3:] = [gate * 0.0 - 0.01 for gate in x[3:]]
    for gate in x[3:]:
        gate[..., 3] = decay * math.log(2)  # one channel decides for its chunk
    compare(x, direction, BOUND[torch.float32])


@pytest.mark.parametrize("direction", ["reverse", "both"])
def test_fast_decays_of_whole_heads_stay_within_16_bits(direction, small_chunks):
    x = draw(37, "scalar", torch.float16)
    x[3:] = [gate * 20 - 100 * (torch.arange(37) % 7 == 3) for gate in x[3:]]
    compare(x, direction, BOUND[torch.float16])


def test_a_gate_of_minus_infinity_forgets_exactly(small_chunks):
    x = draw(21, "vector", torch.float32)
    x[3][:, :, ::5] = -torch.inf
    got = gated_linear_attention(*x[:4], implementation="triton")
    want = gated_linear_attention(*(t.double() for t in x[:4]))
    assert relative(got, want) < 1e-6
    x[3].requires_grad_()
    (grad,) = torch.autograd.grad(gated_linear_attention(*x[:4], implementation="triton").sum(), x[3])
    assert grad.isfinite().all() and (grad[:, :, ::5].abs() < 1e-5).all()


def test_runs_are_bit_identical_and_heads_do_not_mix(small_chunks):
    x = draw(20, "vector", torch.float32, heads=2)
    first = bidirectional_gated_linear_attention(*x, implementation="triton")
    assert torch.equal(first, bidirectional_gated_linear_attention(*x, implementation="triton"))
    alone = bidirectional_gated_linear_attention(*(t[:, 1:] for t in x), implementation="triton")
    assert torch.equal(alone, first[:, 1:]) and first.stride() == x[2].stride()


def test_the_operator_passes_the_checks_of_the_library(small_chunks):
    from foveal.kernels.gated_linear.operator import _operator

    q, k, v, a, b = (t.requires_grad_() for t in draw(20, "vector", torch.float32))
    torch.library.opcheck(
        _operator,
        (q, k, v, a, b, None, 0.3, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_compiled_gradients_equal_eager_ones_in_one_graph(small_chunks):
    x = [t.requires_grad_() for t in draw(20, "vector", torch.float32)]

    def loss(*t):
        return bidirectional_gated_linear_attention(*t, implementation="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16"])
@pytest.mark.parametrize("normalisation", ["division", "subtraction"])
def test_linear_attention_equals_every_pair(normalisation, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 70, KEYS, dtype=dtype), torch.randn(2, 2, 70, KEYS, dtype=dtype)
    v = torch.randn(2, 70, 2, VALUES, dtype=dtype).transpose(1, 2)
    added = torch.randn(2, 2, 50, VALUES, dtype=dtype)
    gates = [torch.rand(1, 2, 70, 1) + 0.5 for _ in range(2)]
    weight = torch.randn(v.shape)
    results = []
    for to, name in ((None, "triton"), (torch.float64, "reference")):
        x = [(t if to is None else t.to(to)).detach().requires_grad_() for t in (q, k, v, added, *gates)]
        out = linear_attention(
            *x[:3], normalisation=normalisation, added=x[3], key_gate=x[4], value_gate=x[5], implementation=name
        )
        results.append([out, *torch.autograd.grad(out, x, weight.to(out.dtype))])
    assert results[0][0].stride() == v.stride()
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < BOUND[dtype]


@pytest.mark.parametrize("programs", [1, 6, 1000], ids=["one-part", "uneven-parts", "a-part-a-tile"])
def test_parts_of_the_tokens_change_nothing_but_rounding(programs, monkeypatch):
    from foveal.kernels.gated_linear import plain_call

    monkeypatch.setattr(plain_call, "PROGRAMS", programs)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 24).transpose(1, 2) for _ in range(3))
    for made in (plain_call.summing, plain_call.attending):
        made.cache_clear()
    found = [linear_attention(q, k, v, added=v[:, :, 70:], implementation="triton") for _ in range(2)]
    for made in (plain_call.summing, plain_call.attending):
        made.cache_clear()
    assert torch.equal(*found)
    assert relative(found[0], linear_attention(*(x.double() for x in (q, k, v)), added=v[:, :, 70:])) < 1e-5


@pytest.mark.parametrize("width", [72, 96])
def test_heads_of_a_projection_are_read_and_written_in_place(width):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 70, 3 * 2 * width).half().unflatten(-1, (3, 2, width)).permute(2, 0, 3, 1, 4)
    out = linear_attention(q, k, v, implementation="triton")
    assert relative(out, linear_attention(q.double(), k.double(), v.double())) < BOUND[torch.float16]
    assert out.transpose(1, 2).is_contiguous()


def test_rows_promise_no_more_alignment_than_they_have():
    from foveal.kernels.gated_linear.plain_call import alignment

    whole = torch.empty(2, 5, 4, 72, dtype=torch.bfloat16)
    assert alignment(whole.transpose(1, 2)) == 8 and alignment(whole, whole.float()) == 8
    assert alignment(torch.empty(2, 3, 5, 20).half()) == 4 and alignment(torch.empty(2, 3, 5, 7)) == 1
    assert (
        alignment(torch.empty(5, 7).expand(1, 1, 5, 7)) == 1
        and alignment(torch.empty(1, 1, 5, 8).expand(9, 1, 5, 8)) == 4
    )


def test_linear_attention_compiles_in_one_graph():
    x = [torch.randn(1, 1, 20, 16).requires_grad_() for _ in range(3)]

    def loss(*t):
        return linear_attention(*t, implementation="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x), strict=True):
        torch.testing.assert_close(got, want)


def test_wide_values_are_split_between_programs():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 72)
    x = [t.requires_grad_() for t in (q, k, v)]
    results = []
    for name in ("triton", "torch"):
        out = linear_attention(*x, implementation=name)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
