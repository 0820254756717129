"""Selection on a GPU: its kernels equal their PyTorch forms, and a whole step waits for nothing and fits one CUDA graph."""

import pytest
import torch
from on_card import captured, relative, without_waiting
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, KernelOptions, block_sparse_attention
from foveal.kernels.selection import (
    block_lists,
    block_probabilities,
    block_scores,
    keep_top_k,
    keep_top_p,
    pool_blocks,
    top_k_lists,
    top_p_lists,
)
from foveal.kernels.selection.pooling import BlockStatistics, _pooled

pytestmark = pytest.mark.gpu

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
IMPLEMENTATIONS = [
    pytest.param("hopper", marks=pytest.mark.skipif(not ON_HOPPER, reason="written for compute capability 9.0")),
    "triton",
]
N, HEADS, BLOCK = 2500, 3, 128
ROWS = -(-N // BLOCK)


def runs(lengths: list[int]) -> tuple[Tensor, Tensor]:
    length = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    return length.cumsum(0, dtype=torch.int32) - length, length


def orders(kind: str, positions: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (positions,) if kind == "shared" else (2, HEADS, positions)
    order = torch.rand(shape, device="cuda").argsort(-1)
    return order.masked_fill(torch.rand(shape, device="cuda") < 0.05, -1)  # padding


@pytest.mark.parametrize("order", ["none", "shared", "by head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dim", [128, 72])
def test_pooled_statistics_equal_those_of_pytorch(dim: int, dtype: torch.dtype, order: str):
    lengths = [128, 0, 7, 300, 64, 1, 500]
    start, length = runs(lengths)
    x = torch.randn(2, sum(lengths), HEADS, dim, device="cuda", dtype=dtype).transpose(1, 2) + 2
    places = orders(order, sum(lengths))
    ours = pool_blocks(x, start, length, places, max_length=500, variance=True, likeness=True)
    want = _pooled(x, start[None, None], length[None, None], places, 500, True, True)
    for name, a, b in zip(ours._fields, ours, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("c", [5, 1000, 2500])
def test_lists_equal_those_of_pytorch(c: int):
    keep = torch.rand(2, 3, 7, c) < 0.3
    for width in (None, c // 4 + 1):
        ours, want = block_lists(keep.cuda(), width=width), block_lists(keep, width=width)
        assert torch.equal(ours.count.cpu(), want.count) and torch.equal(ours.index.cpu(), want.index)


@pytest.mark.parametrize("c", [9, 928, 5000])
def test_rules_keep_what_they_keep_on_the_cpu(c: int):
    gen = torch.Generator().manual_seed(c)
    scores = torch.randint(0, 40, (1, 2, 5, c), generator=gen).float()  # many equal ones
    for k in (1, c // 3):
        kept = keep_top_k(scores, k)
        assert torch.equal(keep_top_k(scores.cuda(), k).cpu(), kept)
        ours, want = top_k_lists(scores.cuda(), k), block_lists(kept, width=k)
        assert torch.equal(ours.count.cpu(), want.count) and torch.equal(ours.index.cpu(), want.index)
    mass = scores / 2.0**18  # sums are exact in any order
    mass = mass / 2.0 ** mass.sum(-1, keepdim=True).log2().ceil()
    for p in (0.25, 0.75):
        assert torch.equal(keep_top_p(mass.cuda(), p).cpu(), keep_top_p(mass, p))
        assert torch.equal(top_p_lists(mass.cuda(), p).index.cpu(), block_lists(keep_top_p(mass, p)).index)


@pytest.mark.parametrize("c", [7, 928])
def test_scores_have_the_accuracy_of_fp32(c: int):
    gen = torch.Generator("cuda").manual_seed(c)
    draw = lambda *shape: torch.randn(*shape, device="cuda", generator=gen)  # noqa: E731
    q = BlockStatistics(draw(1, 4, 70, 128), torch.ones(1, 4, 70, device="cuda"))
    k = BlockStatistics(draw(1, 2, c, 128), torch.full((1, 2, c), 5.0, device="cuda"), draw(1, 2, c, 128).square())
    exact = q.mean.double() @ k.mean.double().repeat_interleave(2, 1).mT * 0.3
    assert relative(block_scores(q, k, 0.3), exact) < 1e-6
    exact += (
        q.mean.double().square() @ k.var.double().repeat_interleave(2, 1).mT * 0.045
        + torch.tensor(5.0).double().log().item()
    )
    assert relative(block_scores(q, k, 0.3, weighted=True, gaussian=True), exact) < 1e-6


def blocks() -> dict[str, Tensor]:
    start = torch.arange(0, N, BLOCK, device="cuda", dtype=torch.int32)
    length = (N - start).clamp(max=BLOCK)
    return {"q_start": start, "q_len": length, "kv_start": start, "kv_len": length}


def step(q: Tensor, k: Tensor, v: Tensor, run: dict[str, Tensor], rule: str, implementation: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Select and attend. -> (out, count)"""
    scale = q.shape[-1] ** -0.5
    pooled = [pool_blocks(x, run["q_start"], run["q_len"], max_length=BLOCK, variance=True) for x in (q, k)]
    scores = block_scores(*pooled, 4 * scale, weighted=True, gaussian=True)
    if rule == "top k":
        lists = top_k_lists(scores, 5)
    elif rule == "top k, best first":
        lists = block_lists(keep_top_k(scores, 5), width=5, scores=scores)
    else:
        lists = top_p_lists(block_probabilities(scores), 0.5)
    plan = BlockPlan(
        n_queries=N, n_keys=N, **run, count=lists.count, n_full=lists.count, index=lists.index, max_q_len=BLOCK, max_kv_len=BLOCK,
        covers=True, kv_stride=BLOCK, tiled=True, trusted=True,
    )  # fmt: skip
    options = KernelOptions(implementation=implementation)
    return block_sparse_attention(q, k, v, plan, scale=scale, options=options), lists.count


def data(seed: int = 0) -> list[Tensor]:
    """q, k, v whose blocks differ, so that some matter more than others."""
    gen = torch.Generator("cuda").manual_seed(seed)
    draw = lambda n: torch.randn(1, n, HEADS, 128, device="cuda", generator=gen)  # noqa: E731
    made = [draw(N) + draw(ROWS).repeat_interleave(BLOCK, 1)[:, :N] for _ in range(3)]
    return [x.to(torch.bfloat16).transpose(1, 2) for x in made]


RULES = ("top k", "top k, best first", "top p")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_waits_for_nothing(implementation: str, rule: str):
    q, k, v = data()
    run = blocks()
    first, count = step(q, k, v, run, rule, implementation)
    assert int(count.min()) >= 1 and first.isfinite().all()
    with without_waiting():
        second, _ = step(q, k, v, run, rule, implementation)
    assert torch.equal(first, second)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_captured_step_selects_anew_from_new_data(implementation: str, rule: str):
    q, k, v = data()
    run = blocks()
    graph, (out, count) = captured(lambda: step(q, k, v, run, rule, implementation))
    graph.replay()
    before = out.clone(), count.clone()
    for x, new in zip((q, k, v), data(1), strict=True):
        x.copy_(new)
    graph.replay()
    want, want_count = step(q, k, v, run, rule, implementation)
    assert torch.equal(out, want) and torch.equal(count, want_count)
    assert not torch.equal(out, before[0])
    assert torch.equal(count, before[1]) == (rule != "top p")


def test_everything_kept_equals_dense_attention():
    q, k, v = data()
    keep = torch.ones(1, HEADS, ROWS, ROWS, dtype=torch.bool, device="cuda")
    lists = block_lists(keep)
    plan = BlockPlan(n_queries=N, n_keys=N, **blocks(), count=lists.count, n_full=lists.count, index=lists.index)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative(block_sparse_attention(q, k, v, plan), dense) < 5e-3
