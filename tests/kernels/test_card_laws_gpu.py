"""Laws of every kernel on a GPU: CUDA graphs, no waiting, whole-graph compilation, few variants, more than 2^31 elements.

``torch.cuda.set_sync_debug_mode`` sees what PyTorch makes the host wait for; kernels of Triton are started without any waiting.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_card import captured, relative, renew, sampled_error, tensors, uniform_plan, without_waiting
from plan_fuzz import Case, Recipe, make_case, recipes
from torch import Tensor

from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention
from foveal.kernels.gated_linear import (
    bidirectional_gated_linear_attention,
    gated_linear_attention,
    linear_attention,
)
from foveal.kernels.order import permute_tokens
from foveal.kernels.selection import pool_blocks

pytestmark = pytest.mark.gpu

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
IMPLEMENTATIONS = [
    pytest.param("hopper", marks=pytest.mark.skipif(not ON_HOPPER, reason="written for compute capability 9.0")),
    "triton",
]
EVERYTHING = frozenset({"box", "bits", "block_bias", "key_bias", "dense", "init", "lse", "order", "heads"})
RECIPES = {
    "plain": Recipe(torch.bfloat16, 128, frozenset({"lse", "dense"})),
    "everything": Recipe(torch.bfloat16, 72, EVERYTHING),
}
SEEDS = {"plain": 10, "everything": 11}  # of cases with a positive scale and lists of several blocks


def case_of(name: str) -> Case:
    return make_case(RECIPES[name], SEEDS[name], "cuda", longest=400)


def attend(case: Case, implementation: str) -> tuple[Tensor, Tensor]:
    options = KernelOptions(implementation=implementation)
    return block_sparse_attention(
        case.q, case.k, case.v, case.plan, scale=case.scale, init=case.init, return_lse=True, options=options
    )


def test_the_guard_notices_waiting():
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), without_waiting():
        x.item()


# ---- block-sparse attention
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_captured_call_follows_new_data(implementation: str, name: str):
    case = case_of(name)
    graph, held = captured(lambda: attend(case, implementation))
    graph.replay()
    before = [x.clone() for x in tensors(held)]
    renew(case.q, case.k, case.v)
    graph.replay()
    for got, old, want in zip(tensors(held), before, attend(case, implementation), strict=True):
        assert torch.equal(got, want) and not torch.equal(got, old)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_second_call_waits_for_nothing(implementation: str, name: str):
    case = case_of(name)
    first = attend(case, implementation)
    with without_waiting():
        second = attend(case, implementation)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not ON_HOPPER, reason="written for compute capability 9.0")
@pytest.mark.parametrize("name", RECIPES)
def test_a_compiled_call_of_hopper_equals_the_eager_one(name: str):
    case = case_of(name)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = KernelOptions(implementation="hopper")
        return 2 * block_sparse_attention(q + 1, k, v, case.plan, scale=case.scale, options=options)

    eager = call(case.q, case.k, case.v)
    assert relative(torch.compile(call, fullgraph=True)(case.q, case.k, case.v), eager) < 4e-3


@pytest.mark.skipif(not ON_HOPPER, reason="written for compute capability 9.0")
def test_a_compiled_call_takes_keys_that_are_not_aligned():
    n = 2500
    plan = uniform_plan(n, torch.full((1, 1, -(-n // 128)), 3)).to("cuda")
    wide = torch.randn(3, 1, n, 2, 136, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x[..., 4:132].transpose(1, 2) for x in wide)  # 8 bytes past a multiple of 16

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, plan, options=KernelOptions(implementation="hopper"))

    with pytest.raises(ValueError, match="not rows of one aligned table"):
        call(q, k, v)
    want = block_sparse_attention(q, k, v, plan, options=KernelOptions(implementation="triton"))
    assert relative(torch.compile(call, fullgraph=True)(q, k, v), want) < 4e-3


def variants(implementation: str) -> int:
    """Variants of its kernel compiled in this process."""
    if implementation == "hopper":
        from foveal.kernels.block_sparse.hopper import block_sparse_hopper as kernel
    else:
        from foveal.kernels.block_sparse.portable import block_sparse_forward as kernel
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_compiled_after_the_second_resolution(implementation: str):
    def call(n: int) -> int:
        plan = uniform_plan(n, torch.full((1, 1, -(-n // 128)), 3)).to("cuda")
        q = torch.randn(1, n, 3, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        block_sparse_attention(q, q, q, plan, options=KernelOptions(implementation=implementation))
        return variants(implementation)

    call(2500)  # one that cuts its last block
    before = call(4096)  # and one of whole blocks
    assert [call(n) for n in (2333, 3001, 5120, 7777, 8192, 16640)] == [before] * 6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unequal_counts_equal_the_reference(implementation: str):
    gen = torch.Generator().manual_seed(0)
    n, rows = 6000, 47
    gamma = torch._standard_gamma(
        torch.ones(1, 4, rows, dtype=torch.float64), generator=gen
    )  # coefficient of variation 1
    count = (gamma * 6).int().clamp(max=rows)
    assert int(count.min()) == 0 and int(count.max()) > 20
    plan = uniform_plan(n, count).to("cuda")
    q, k, v = (torch.randn(1, n, 4, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    out, lse = block_sparse_attention(
        q, k, v, plan, return_lse=True, options=KernelOptions(implementation=implementation)
    )
    wide = (x.double() for x in (q, k, v))
    want, want_lse = block_sparse_attention(
        *wide, plan, return_lse=True, options=KernelOptions(implementation="reference")
    )
    assert relative(out, want) < 4e-3
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=1e-2, rtol=1e-2)


# ---- more than 2^31 elements
HEADS, WIDTH = 24, 128
LONG = 720_005  # tokens: 2.2e9 elements, 4.4 GB in bf16; a multiple of no block
LAST = [0, LONG // 2 + 3, LONG - 1]


@pytest.fixture(scope="module")
def long_data() -> Iterator[list[Tensor]]:
    if torch.cuda.mem_get_info()[1] < 40e9:
        pytest.skip("needs 40 GB of device memory")
    data = [torch.empty(LONG * HEADS * WIDTH, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3)]
    assert data[0].numel() > 2**31
    yield data
    data.clear()
    torch.cuda.empty_cache()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """-> [1, HEADS, LONG, WIDTH]"""
    if layout == "heads first":
        return x.view(1, HEADS, LONG, WIDTH)
    return x.view(1, LONG, HEADS, WIDTH).transpose(1, 2)


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_elements_than_31_bits_count_are_attended_right(long_data: list[Tensor], implementation: str, layout: str):
    q, k, v = (laid_out(x, layout) for x in long_data)
    plan = uniform_plan(LONG, torch.full((1, 1, -(-LONG // 128)), 4))
    out = block_sparse_attention(q, k, v, plan.to("cuda"), options=KernelOptions(implementation=implementation))
    assert sampled_error(out, q, k, v, plan, LAST) < 4e-3


def test_more_elements_than_31_bits_count_are_permuted_and_pooled_right(long_data: list[Tensor]):
    for layout in ("tokens first", "heads first"):
        x = laid_out(long_data[0], layout)
        order = torch.arange(LONG - 1, -1, -1, device="cuda")
        turned = permute_tokens(x, order)
        assert all(torch.equal(turned[0, h, n], x[0, h, LONG - 1 - n]) for h in (0, HEADS - 1) for n in LAST)
        del turned
        start = torch.arange(0, LONG, 128, device="cuda", dtype=torch.int32)
        pooled = pool_blocks(x, start, (LONG - start).clamp(max=128), max_length=128)
        for h in (0, HEADS - 1):
            torch.testing.assert_close(pooled.mean[0, h, -1], x[0, h, int(start[-1]) :].float().mean(0))


def test_more_elements_than_31_bits_count_pass_through_gated_attention():
    n, heads, keys, values, last = 4_300_000, 8, 32, 64, 512
    if torch.cuda.mem_get_info()[1] < 40e9:
        pytest.skip("needs 40 GB of device memory")
    make = lambda width: torch.randn(1, n, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
    q, k, v = make(keys), make(keys), make(values)
    assert v.numel() > 2**31
    gate = F.logsigmoid(torch.randn(1, heads, n, device="cuda"))  # what is 500 tokens ago is forgotten
    out = gated_linear_attention(q, k, v, gate, implementation="triton")
    tail = [x[:, :, -3 * last :].double() for x in (q, k, v, gate)]
    want = gated_linear_attention(*tail, implementation="torch")
    assert relative(out[:, :, -last:], want[:, :, -last:]) < 6e-3


# ---- linear attention
def linear_call(kind: str) -> tuple[list[Tensor], Any]:
    """Inputs, and a forward and backward pass over them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 500, 3, w, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for w in (32, 32, 64))
    shape = (2, 3, 500, 32) if kind == "vector" else (2, 3, 500)
    gates = [F.logsigmoid(torch.randn(shape, device="cuda")) / 4 for _ in range(2)]
    inputs = [q, k, v] if kind == "no gate" else [q, k, v, *gates]
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.randn(v.shape, device="cuda", dtype=torch.bfloat16)

    def call() -> list[Tensor]:
        out = linear_attention(*leaves) if kind == "no gate" else bidirectional_gated_linear_attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weight)]

    return leaves, call


@pytest.mark.parametrize("kind", ["vector", "scalar", "no gate"])
def test_a_captured_pass_of_linear_attention_follows_new_data(kind: str):
    leaves, call = linear_call(kind)
    graph, held = captured(call)
    graph.replay()
    before = [x.clone() for x in held]
    renew(*leaves[:3])
    graph.replay()
    for got, old, want in zip(held, before, call(), strict=True):
        assert torch.equal(got, want) and not torch.equal(got, old)


@pytest.mark.parametrize("kind", ["vector", "scalar", "no gate"])
def test_a_second_pass_of_linear_attention_waits_for_nothing(kind: str):
    _, call = linear_call(kind)
    first = call()
    with without_waiting():
        second = call()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_proxies_follow_new_data_in_a_captured_call():
    case = make_case(recipes((torch.bfloat16, torch.float16), (128, 64))[9], 10, "cuda", longest=384)
    graph, held = captured(lambda: attend(case, "triton"))
    assert case.plan.proxies is not None
    renew(case.q, case.plan.proxies.k)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, attend(case, "triton"), strict=True))
