"""Selection: pooled statistics are what they say, rules keep what they promise, lists hold exactly what was kept."""

import pytest
import torch

from foveal.kernels.block_sparse import BlockPlan, block_sparse_attention
from foveal.kernels.block_sparse.needs import INTERPRETED
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
from foveal.kernels.selection.keeping import ranks

START, LENGTH = torch.tensor([0, 7, 7, 20]), torch.tensor([7, 0, 13, 5])
GEN = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 25, 8, generator=GEN)
ORDERS = {
    "no order": None,
    "one order": torch.randperm(25, generator=GEN),
    "an order per head": torch.stack([torch.stack([torch.randperm(25, generator=GEN) for _ in range(3)]) for _ in range(2)]),
}  # fmt: skip


def tokens(order, b, h):
    return X[b, h] if order is None else X[b, h][order if order.ndim == 1 else order[b, h]]


def check_pooled(pooled, order):
    for b in range(2):
        for h in range(3):
            for c, (start, length) in enumerate(zip(START.tolist(), LENGTH.tolist(), strict=True)):
                rows = tokens(order, b, h)[start : start + length]
                mean = rows.mean(0) if length else torch.zeros(8)
                torch.testing.assert_close(pooled.mean[b, h, c], mean, atol=1e-6, rtol=1e-5)
                var = rows.var(0, unbiased=False) if length else torch.zeros(8)
                torch.testing.assert_close(pooled.var[b, h, c], var, atol=1e-6, rtol=1e-5)
                unit = torch.nn.functional.normalize(rows, dim=-1)
                like = (unit @ unit.T).mean() if length else torch.tensor(0.0)
                torch.testing.assert_close(pooled.likeness[b, h, c], like, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ORDERS)
def test_pooled_statistics_are_those_of_the_blocks_tokens(name):
    order = ORDERS[name]
    check_pooled(pool_blocks(X, START, LENGTH, order, variance=True, likeness=True), order)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ORDERS)
def test_the_triton_kernel_pools_the_same(name):
    from foveal.kernels.selection.pooling import BlockStatistics
    from foveal.kernels.selection.portable import pool_rows

    start, length = START[None, None].int(), LENGTH[None, None].int()
    found = pool_rows(X, start, length, ORDERS[name], 13, True, True)
    check_pooled(BlockStatistics(*found), ORDERS[name])


@pytest.mark.parametrize(
    "how",
    ["torch", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter"))],
)
def test_padding_of_an_order_is_not_there(how):
    order = torch.arange(25)
    order[[1, 2, 22]] = -1
    start, length = START[None, None].int(), LENGTH[None, None].int()
    if how == "torch":
        pooled = pool_blocks(X, START, LENGTH, order, variance=True)
    else:
        from foveal.kernels.selection.pooling import BlockStatistics
        from foveal.kernels.selection.portable import pool_rows

        pooled = BlockStatistics(*pool_rows(X, start, length, order, 13, True, False))
    assert pooled.n[1, 2].tolist() == [5, 0, 13, 4]
    torch.testing.assert_close(pooled.mean[:, :, 0], X[:, :, [0, 3, 4, 5, 6]].mean(2))
    torch.testing.assert_close(pooled.var[:, :, 0], X[:, :, [0, 3, 4, 5, 6]].var(2, unbiased=False))


def test_blocks_past_the_end_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="ends at position 26, the sequence has 25"):
        pool_blocks(X, START, torch.tensor([7, 0, 13, 6]))


def test_gaussian_scores_are_the_log_mass_of_normal_keys():
    gen = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 1, 200_000, 4, generator=gen) * torch.tensor([0.5, 1.0, 0.2, 0.8]) + 0.3
    q = torch.tensor([0.4, -0.7, 1.0, 0.2])[None, None, None]
    start, length = torch.zeros(1, dtype=torch.int), torch.tensor([200_000])
    pooled = pool_blocks(keys, start, length, variance=True)
    query = pool_blocks(q, torch.zeros(1, dtype=torch.int), torch.ones(1, dtype=torch.int))
    mass = torch.logsumexp((q @ keys.mT) * 0.9, dim=-1, keepdim=True)
    scores = block_scores(query, pooled, 0.9, weighted=True, gaussian=True)
    torch.testing.assert_close(scores, mass, atol=2e-2, rtol=0)


def test_empty_blocks_are_never_kept():
    pooled = pool_blocks(X, START, LENGTH)
    scores = block_scores(pooled, pooled, 0.3)
    assert not keep_top_k(scores, 4)[..., 1].any()
    assert not keep_top_p(block_probabilities(scores), 1.0)[..., 1].any()


@pytest.mark.parametrize("k", [1, 3, 9, 50])
def test_top_k_keeps_the_k_best_and_the_earlier_of_equals(k):
    scores = torch.randint(0, 5, (2, 3, 4, 9), generator=GEN).float()
    keep = keep_top_k(scores, k)
    assert (keep.sum(-1) == min(k, 9)).all()
    key = scores * 100 - torch.arange(9)
    assert torch.equal(keep, key >= key.topk(min(k, 9)).values[..., -1:])


def test_budgets_may_differ_by_head():
    scores = torch.rand(1, 3, 4, 9, generator=GEN)
    keep = keep_top_k(scores, torch.tensor([2, 0, 9])[None, :, None])
    assert keep.sum(-1).unique(dim=-1).flatten().tolist() == [2, 1, 9]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    mass = block_probabilities(torch.randn(2, 2, 5, 30, generator=GEN) * 2)
    keep = keep_top_p(mass, p)
    kept = (mass * keep).sum(-1)
    assert (kept >= p - 1e-5).all()
    if p < 1:
        weakest = torch.where(keep, mass, 2.0).amin(-1)
        assert (kept - weakest < p).all()
    assert (torch.where(keep, mass, 2.0).amin(-1) >= torch.where(keep, -1.0, mass).amax(-1)).all()


def test_top_p_under_drops_the_crossing_block_but_keeps_one():
    mass = torch.tensor([[[[0.6, 0.3, 0.1]]]])
    assert keep_top_p(mass, 0.7)[0, 0, 0].tolist() == [True, True, False]
    assert keep_top_p(mass, 0.7, rule="under")[0, 0, 0].tolist() == [True, False, False]
    assert keep_top_p(mass, 0.5, rule="under")[0, 0, 0].tolist() == [True, False, False]
    assert keep_top_p(mass, 0.5, least=2)[0, 0, 0].tolist() == [True, True, False]


@pytest.mark.parametrize(
    "call", [lambda s: keep_top_k(s, 0), lambda s: keep_top_p(s, 0.0), lambda s: keep_top_p(s, 1.5)]
)
def test_budgets_that_keep_nothing_or_too_much_are_refused(call):
    with pytest.raises(ValueError, match=r"at least one block|lies in \(0, 1\]"):
        call(torch.zeros(1, 1, 1, 3))


@pytest.mark.parametrize("width", [None, 4])
def test_lists_hold_exactly_what_was_kept(width):
    keep = torch.rand(2, 3, 5, 11, generator=GEN) < 0.3
    lists = block_lists(keep, width=width)
    for row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        want = keep[tuple(row)].nonzero().flatten()[:width].tolist()
        assert lists.index[tuple(row)][: lists.count[tuple(row)]].tolist() == want


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_the_triton_kernel_lists_the_same():
    from foveal.kernels.selection.portable import compact

    keep = torch.rand(2, 3, 5, 11, generator=GEN) < 0.3
    for width in (11, 2):
        count, index = compact(keep, width)
        want = block_lists(keep, width=width)
        assert torch.equal(count, want.count) and torch.equal(index, want.index)


def test_priority_lists_start_with_the_best():
    scores = torch.rand(1, 2, 3, 8, generator=GEN)
    keep = keep_top_k(scores, 4)
    lists = block_lists(keep, width=3, scores=scores)
    assert torch.equal(lists.index, scores.topk(3).indices.int()) and (lists.count == 3).all()


def test_keeping_everything_equals_dense_attention():
    q, k, v = (torch.randn(1, 2, 40, 16, generator=GEN) for _ in range(3))
    start = torch.arange(0, 40, 8, dtype=torch.int32)
    length = torch.full_like(start, 8)
    pooled = [pool_blocks(x, start, length, max_length=8) for x in (q, k)]
    keep = keep_top_p(block_probabilities(block_scores(*pooled, 0.25)), 1.0)
    lists = block_lists(keep)
    plan = BlockPlan(
        n_queries=40, n_keys=40, q_start=start, q_len=length, kv_start=start, kv_len=length, count=lists.count, n_full=lists.count,
        index=lists.index,
    )  # fmt: skip
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan, scale=0.25), dense, atol=1e-5, rtol=1e-5)


def test_ranks_are_a_permutation():
    found = ranks(torch.randint(0, 3, (2, 3, 4, 9), generator=GEN).float())
    assert torch.equal(found.sort(-1).values, torch.arange(9).expand_as(found))


def unusual(kind, c):
    scores = torch.randint(-3, 4, (1, 2, 2, c), generator=GEN).float()  # many equal ones, zeros of both signs
    scores = torch.where(scores == 0, torch.where(torch.rand(scores.shape, generator=GEN) < 0.5, 0.0, -0.0), scores)
    if kind == "excluded":
        scores[torch.rand(scores.shape, generator=GEN) < 0.6] = -torch.inf
        scores[0, 0, 0] = -torch.inf
    if kind == "not a number":
        scores[torch.rand(scores.shape, generator=GEN) < 0.3] = torch.nan
    return torch.randn(1, 2, 2, c, generator=GEN) if kind == "distinct" else scores


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("kind", ["distinct", "equal", "excluded", "not a number"])
def test_bisection_keeps_what_a_stable_sort_keeps(kind):
    from foveal.kernels.selection.bisection import keep_best, list_best

    for c in (1, 37):
        scores = unusual(kind, c)
        for k in {1, c // 3 + 1, c}:
            want = keep_top_k(scores, k)
            assert torch.equal(keep_best(scores, k), want)
            lists = block_lists(want, width=k)
            count, index = list_best(scores, k, k)
            assert torch.equal(count, lists.count) and torch.equal(index, lists.index)
    budget = torch.tensor([2, 50])[None, :, None]
    assert torch.equal(keep_best(scores, budget), keep_top_k(scores, budget))
    count, index = list_best(scores, 20, 3)  # more are kept than the lists hold
    assert torch.equal(index, block_lists(keep_top_k(scores, 20), width=3).index) and (count <= 3).all()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("rule", ["cross", "under"])
def test_bisection_keeps_the_mass_that_a_sort_keeps(rule):
    from foveal.kernels.selection.bisection import keep_best, list_best

    mass = torch.randint(0, 20, (1, 2, 2, 37), generator=GEN) / 2.0**18  # sums are exact in any order
    mass = mass / 2.0 ** mass.sum(-1, keepdim=True).log2().ceil()
    mass[0, 0, 0] = 0
    for p, least in ((0.25, 1), (0.75, 30), (1.0, 1), (torch.tensor([0.3, 0.9])[None, :, None], 1)):
        want = keep_top_p(mass, p, rule=rule, least=least)
        assert torch.equal(keep_best(mass, p, mass=True, under=rule == "under", least=least), want)
        count, index = list_best(mass, p, 37, mass=True, under=rule == "under", least=least)
        assert torch.equal(count, block_lists(want).count) and torch.equal(index, block_lists(want).index)


def test_lists_of_the_best_are_lists_of_what_is_kept():
    scores = unusual("excluded", 40)
    for lists, want in (
        (top_k_lists(scores, 7), block_lists(keep_top_k(scores, 7), width=7)),
        (top_k_lists(scores, 7, width=3), block_lists(keep_top_k(scores, 7), width=3)),
        (top_k_lists(scores, torch.tensor([[[3], [9]]])), block_lists(keep_top_k(scores, torch.tensor([[[3], [9]]])))),
        (top_p_lists(scores.softmax(-1), 0.5), block_lists(keep_top_p(scores.softmax(-1), 0.5))),
    ):
        assert torch.equal(lists.count, want.count) and torch.equal(lists.index, want.index)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("dim", [72, 128])
@pytest.mark.parametrize("gaussian", [False, True], ids=["means", "gaussian"])
def test_the_triton_kernel_scores_the_same(dim, gaussian):
    from foveal.kernels.selection.pooling import BlockStatistics
    from foveal.kernels.selection.scoring_kernel import scores_of

    draw = lambda *shape: torch.randn(*shape, generator=GEN)  # noqa: E731
    q = BlockStatistics(draw(2, 4, 5, dim), torch.ones(2, 4, 5))
    k = BlockStatistics(
        draw(2, 2, 70, dim), torch.randint(0, 4, (2, 2, 70), generator=GEN).float(), draw(2, 2, 70, dim).square()
    )
    for weighted in (False, True):
        want = block_scores(q, k, 0.3, weighted=weighted, gaussian=gaussian)
        got = scores_of(q.mean, k.mean, k.var if gaussian else None, k.n, 0.3, weighted)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
