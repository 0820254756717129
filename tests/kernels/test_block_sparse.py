"""Laws of the operator, for every implementation that runs without a GPU."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from plan_fuzz import Case, errors, make_case, recipes
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, KernelOptions, Proxies, block_sparse_attention, choose
from foveal.kernels.merge import merge_attention, scale_add

HALVES = (torch.float32, torch.bfloat16, torch.float16)
EVERY = ("reference", "torch", "triton")
# Triton's interpreter multiplies bfloat16 as integers; that dtype runs on the GPU and in the torch path.
TRITON_DTYPES = (torch.float32, torch.float16)


def floor_of(dtype: torch.dtype) -> float:
    """One rounding of the output: no implementation can be asked for less."""
    return torch.finfo(dtype).eps / 2


def check(case: Case, implementation: str) -> None:
    options = KernelOptions(implementation=implementation)
    out, lse = block_sparse_attention(
        case.q, case.k, case.v, case.plan, scale=case.scale, init=case.init, return_lse=True, options=options
    )
    ours, eager = errors(case, out, lse)
    assert out.dtype == case.q.dtype and not out.isnan().any()
    assert ours <= 1.5 * eager + floor_of(case.q.dtype)


@pytest.mark.parametrize("recipe", recipes(TRITON_DTYPES, (16, 20, 32)), ids=lambda r: r.id)
def test_triton_error_is_at_most_that_of_eager_attention(recipe):
    for seed in range(15):
        check(make_case(recipe, seed, longest=48), "triton")


@pytest.mark.parametrize("recipe", recipes(HALVES, (16, 72, 64)), ids=lambda r: r.id)
def test_torch_error_is_at_most_that_of_eager_attention(recipe):
    for seed in range(15):
        check(make_case(recipe, seed, longest=96), "torch")


@pytest.mark.parametrize("recipe", recipes((torch.float64,), (16,)), ids=lambda r: r.id)
def test_torch_equals_the_definition_in_double_precision(recipe):
    for seed in range(6):
        case = make_case(recipe, 100 + seed)
        for implementation in ("torch", "reference"):
            ours, _ = errors(case, *block(case, implementation))
            assert ours < 1e-6  # biases are fp32 by contract


def block(case: Case, implementation: str) -> tuple[Tensor, Tensor]:
    options = KernelOptions(implementation=implementation)
    return block_sparse_attention(
        case.q, case.k, case.v, case.plan, scale=case.scale, init=case.init, return_lse=True, options=options
    )


def uniform(n: int, m: int, block_q: int, block_k: int, listed: list[list[int]], **extra) -> BlockPlan:
    starts = lambda n, b: torch.arange(0, n, b, dtype=torch.int32)  # noqa: E731
    lengths = lambda n, b: torch.tensor([min(b, n - s) for s in range(0, n, b)], dtype=torch.int32)  # noqa: E731
    width = max(1, max(len(x) for x in listed))
    index = torch.tensor([x + [0] * (width - len(x)) for x in listed], dtype=torch.int32)
    count = torch.tensor([len(x) for x in listed], dtype=torch.int32)
    return BlockPlan(
        n_queries=n, n_keys=m, q_start=starts(n, block_q), q_len=lengths(n, block_q), kv_start=starts(m, block_k), kv_len=lengths(m, block_k),
        count=count, n_full=count, index=index, **extra,
    )  # fmt: skip


def qkv(n: int, m: int, d: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + m)
    return (
        torch.randn(1, 2, n, d, dtype=dtype),
        torch.randn(1, 2, m, d, dtype=dtype),
        torch.randn(1, 2, m, d, dtype=dtype),
    )


@pytest.mark.parametrize("implementation", EVERY)
def test_full_density_equals_dense(implementation):
    q, k, v = qkv(37, 50)
    plan = uniform(37, 50, 16, 16, [[0, 1, 2, 3]] * 3)
    out = block_sparse_attention(q, k, v, plan, options=KernelOptions(implementation=implementation))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)
    assert plan.density == 1


@pytest.mark.parametrize("implementation", EVERY)
def test_plan_and_complement_merge_to_dense(implementation):
    q, k, v = qkv(40, 40)
    plan = uniform(40, 40, 16, 8, [[0, 3], [1], []])
    options = KernelOptions(implementation=implementation)
    parts = [block_sparse_attention(q, k, v, p, return_lse=True, options=options) for p in (plan, plan.complement())]
    torch.testing.assert_close(
        merge_attention(*parts)[0], F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )
    assert plan.density + plan.complement().density == pytest.approx(1)


@pytest.mark.parametrize("implementation", EVERY)
def test_resume_equals_merge(implementation):
    q, k, v = qkv(40, 40)
    plan = uniform(40, 40, 16, 8, [[0, 3], [1], []])
    options = KernelOptions(implementation=implementation)
    first = block_sparse_attention(q, k, v, plan, return_lse=True, options=options)
    out, lse = block_sparse_attention(q, k, v, plan.complement(), init=first, return_lse=True, options=options)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / 4, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", EVERY)
def test_an_empty_row_is_zero_with_lse_minus_infinity(implementation):
    q, k, v = qkv(32, 32)
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        uniform(32, 32, 16, 16, [[], [1]]),
        return_lse=True,
        options=KernelOptions(implementation=implementation),
    )
    assert (out[:, :, :16] == 0).all() and (lse[:, :, :16] == -torch.inf).all() and lse[:, :, 16:].isfinite().all()


@pytest.mark.parametrize("implementation", EVERY)
def test_scale_zero_averages_the_values(implementation):
    q, k, v = qkv(16, 32)
    out = block_sparse_attention(
        q, k, v, uniform(16, 32, 16, 16, [[1]]), scale=0, options=KernelOptions(implementation=implementation)
    )
    torch.testing.assert_close(out, v[:, :, 16:].mean(2, keepdim=True).expand_as(out), atol=1e-5, rtol=1e-5)


def test_output_keeps_the_strides_of_q():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(32, 32))
    for implementation in EVERY:
        out = block_sparse_attention(
            q, k, v, uniform(32, 32, 16, 16, [[0], [0, 1]]), options=KernelOptions(implementation=implementation)
        )
        assert out.stride() == q.stride()


def test_unvisited_keys_get_zero_grad():
    q, k, v = (x.requires_grad_() for x in qkv(32, 48))
    block_sparse_attention(q, k, v, uniform(32, 48, 16, 16, [[0], [0, 2]])).square().sum().backward()
    assert (k.grad[:, :, 16:32] == 0).all() and (v.grad[:, :, 16:32] == 0).all() and k.grad[:, :, :16].abs().sum() > 0


def test_gradients_pass_gradcheck():
    q, k, v = (x.requires_grad_() for x in qkv(10, 12, 4, torch.float64))
    plan = uniform(10, 12, 4, 5, [[0, 2], [], [1]])
    mean = lambda x: torch.stack([x[:, :, s : s + n].mean(2) for s, n in zip((0, 5, 10), (5, 5, 2), strict=True)], 2)  # noqa: E731

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        full = dataclasses.replace(plan, proxies=Proxies(mean(k), mean(v), torch.tensor([[[5.0, 5.0, 2.0]]])))
        return block_sparse_attention(q, k, v, full, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_compiles_to_one_graph():
    q, k, v = qkv(32, 32)
    plan = uniform(32, 32, 16, 16, [[0], [0, 1]])
    call = torch.compile(
        lambda q, k, v: block_sparse_attention(q * 2, k, v, plan) + 1, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(call(q, k, v), block_sparse_attention(q * 2, k, v, plan) + 1)


def test_merging_random_parts_of_the_keys_equals_dense():
    q, k, v = (x.requires_grad_() for x in qkv(9, 31, 8, torch.float64))
    edges = [0, 4, 5, 19, 31]
    parts = []
    for a, b in itertools.pairwise(edges):
        s = q @ k[:, :, a:b].mT
        parts.append((s.softmax(-1) @ v[:, :, a:b], s.logsumexp(-1)))
    empty = (torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], -torch.inf))
    out, lse = merge_attention(*parts, empty)
    dense = (q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(out, dense)
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((dense * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    both = merge_attention(empty, empty)
    assert (both[0] == 0).all() and (both[1] == -torch.inf).all() and not lse.isnan().any()


def test_scale_add_is_a_per_query_epilogue():
    out, add = torch.randn(2, 1, 3, 5, 4)
    scale = torch.rand(1, 3, 5)
    torch.testing.assert_close(scale_add(out, scale, add), scale[..., None] * out + add)


def test_two_runs_are_bit_identical():
    case = make_case(recipes((torch.float32,), (16,))[-2], 3)
    assert torch.equal(block(case, "torch")[0], block(case, "torch")[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[0], k, v), "[batch, heads, tokens, head_dim]"),
        (lambda q, k, v: (q, k[:, :, :-1], v[:, :, :-1]), "make a plan for this length"),
        (lambda q, k, v: (q, k, v[:, :, :-1]), "k and v alike"),
        (lambda q, k, v: (q, k.double(), v), "one dtype"),
        (lambda q, k, v: (q.repeat(1, 2, 1, 1)[:, :3], k, v), "multiple of the key heads"),
        (lambda q, k, v: (q.to_sparse(), k, v), "strided"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(change, words):
    plan = uniform(32, 32, 16, 16, [[0], [1]])
    with pytest.raises(ValueError) as error:
        block_sparse_attention(*change(*qkv(32, 32)), plan)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_no_kernel_takes_is_refused_with_the_reason():
    q = torch.zeros(1, 1, 4, 2000)
    with pytest.raises(ValueError, match="head_dim 2000 is outside"):
        choose(q)
    with pytest.raises(ValueError, match="dtype int64"):
        choose(torch.zeros(1, 1, 4, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        choose(q, options=KernelOptions(implementation="trition"))
    with pytest.raises(ValueError, match="bfloat16 as integers"):
        choose(torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16), options=KernelOptions(implementation="triton"))
    with pytest.raises(ValueError, match="head_dim 2000 is outside 16 to 256"):
        choose(q, options=KernelOptions(implementation="triton"))


def test_merge_refuses_one_part_and_unequal_shapes():
    part = (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="at least two"):
        merge_attention(part)
    with pytest.raises(ValueError, match="same out shape"):
        merge_attention(part, (torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5)))


def test_two_thousand_gpu_cases_share_forty_compiled_variants(monkeypatch):
    """What the GPU fuzz compiles, counted without a GPU: switches, dtypes and the integers Triton specialises on."""
    from test_block_sparse_gpu import CASES, RECIPES, VARIANTS

    from foveal.kernels.block_sparse import portable, portable_call

    names, seen = portable.block_sparse_forward.arg_names, set()

    constants = set(names[names.index("D") :]) | {"num_warps", "num_stages"}

    def variant(*args, **named):
        given = {
            n: x
            for n, x in {**dict(zip(names, args, strict=False)), **named}.items()
            if n not in portable.UNSPECIALISED
        }
        ints = [(n, x == 1, x % 16 == 0) for n, x in given.items() if isinstance(x, int) and n not in constants]
        kinds = [x.dtype for x in args if isinstance(x, Tensor)]
        seen.add(str((ints, kinds, sorted((n, x) for n, x in given.items() if n in constants))))

    monkeypatch.setattr(
        portable_call, "block_sparse_forward", type("Kernel", (), {"__getitem__": lambda self, grid: variant})()
    )
    monkeypatch.setattr(portable_call, "_chip", lambda q: (90, 232448))
    for recipe in RECIPES:
        for seed in range(0, CASES // len(RECIPES), 4):
            case = make_case(recipe, seed, longest=384)
            portable_call.triton_attention(case.q, case.k, case.v, case.plan, case.scale, True, case.init)
    assert len(RECIPES) <= len(seen) <= VARIANTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call_and_its_backward_changes_nothing(dtype):
    plan = uniform(32, 32, 16, 16, [[0], [0, 1]])
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(32, 32))
    plain = block_sparse_attention(q, k, v, plan)
    grads = torch.autograd.grad(plain.float().square().sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(q, k, v, plan)
        inside = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert torch.equal(out, plain) and all(torch.equal(a, b) for a, b in zip(grads, inside, strict=True))
