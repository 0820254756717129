"""Laws of the block plan itself: what it refuses, what it counts, what it derives."""

import dataclasses

import pytest
import torch

from foveal.kernels.block_sparse import BlockPlan, Box, PlanError, Proxies


def fields(**change):
    """3 query blocks over 10 queries, 4 key blocks over 12 keys."""
    base = dict(
        n_queries=10,
        n_keys=12,
        q_start=torch.tensor([0, 4, 7]),
        q_len=torch.tensor([4, 3, 3]),
        kv_start=torch.tensor([0, 3, 6, 8]),
        kv_len=torch.tensor([3, 3, 2, 4]),
        count=torch.tensor([2, 1, 4]),
        n_full=torch.tensor([2, 1, 4]),
        index=torch.tensor([[0, 2, 0, 0], [3, 0, 0, 0], [0, 1, 2, 3]]),
    )
    return {**base, **change}


def plan(**change):
    return BlockPlan(**fields(**change))


def literal_mask(p, batch=0, head=0):
    """Token by token, from the field descriptions alone."""

    def at(x):
        return x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)]

    mask = torch.zeros(p.n_queries, p.n_keys, dtype=torch.bool)
    dense = {r for a, b in p.dense_rows for r in range(a, b)}

    def owner(order, i):
        return i if order is None or p.ordered else int((order if order.ndim == 1 else at(order))[i])

    for r in range(p.n_q_blocks):
        entries = at(p.index)[r][: int(at(p.count)[r])].tolist() if r not in dense else range(p.n_kv_blocks)
        for slot, c in enumerate(entries):
            full = r in dense or slot < int(at(p.n_full)[r])
            if p.block_bias is not None:
                row = at(p.block_bias)
                if row[min(r, row.shape[0] - 1), c] == -torch.inf:
                    continue
            for i in range(int(at(p.q_start)[r]), int(at(p.q_start)[r] + at(p.q_len)[r])):
                for j in range(int(at(p.kv_start)[c]), int(at(p.kv_start)[c] + at(p.kv_len)[c])):
                    ok = True
                    if not full and p.box is not None:
                        ok &= bool(
                            ((p.box.low[:, i] <= p.box.coord[:, j]) & (p.box.coord[:, j] < p.box.high[:, i])).all()
                        )
                    if not full and p.row_bits is not None:
                        ok &= bool((int(at(p.row_bits)[i, c // 32]) >> (c % 32)) & 1)
                    if p.key_bias is not None:
                        ok &= bool(at(p.key_bias)[j] > -torch.inf)
                    q, k = owner(p.q_order, i), owner(p.kv_order, j)
                    if ok and q >= 0 and k >= 0:
                        mask[q, k] = True
    return mask


def random_plan(seed):
    """Any mixture of fields, per batch item and head."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, high=2):
        return torch.randint(0, high, shape, generator=g)

    b, h, r, c, k = 1 + seed % 2, 1 + seed // 2 % 2, 3, 5, 4
    n_q, n_k, pad = 9, 11, 2 if seed % 3 == 0 else 0
    pq, pk = n_q + pad, n_k + pad

    def cut(p, n):
        return torch.cat([torch.tensor([0]), torch.randperm(p - 1, generator=g)[: n - 1].sort().values + 1])

    qs, ks = cut(pq, r), cut(pk, c)
    count = draw(b, h, r, high=k + 1)
    partial = seed % 4 != 0
    n_full = (count * torch.rand(count.shape, generator=g)).long() if partial else count

    def order(n, p):
        return torch.cat([torch.randperm(n, generator=g), -torch.ones(p - n, dtype=torch.long)])[
            torch.randperm(p, generator=g)
        ]

    extra = {}
    if partial and seed % 4 != 2:
        extra["box"] = Box(draw(2, pq, high=3).short(), 2 + draw(2, pq, high=3).short(), draw(2, pk, high=5).short())
    if partial and seed % 4 != 1:
        extra["row_bits"] = draw(b, h, pq, 1, high=32).int()
    if seed % 5 == 0:
        extra["key_bias"] = torch.where(torch.rand(b, 1, pk, generator=g) < 0.3, -torch.inf, 0.5)
    if seed % 5 == 1:
        extra["block_bias"] = torch.where(torch.rand(1, h, r, c, generator=g) < 0.3, -torch.inf, 0.5)
    if seed % 7 == 0:
        extra["dense_rows"] = ((1, 2),)
    if pad or seed % 2:
        extra |= dict(
            q_order=order(n_q, pq), kv_order=torch.stack([order(n_k, pk) for _ in range(b * h)]).view(b, h, pk)
        )
    return BlockPlan(
        n_queries=n_q, n_keys=n_k,
        q_start=qs, q_len=torch.diff(qs, append=torch.tensor([pq])) - draw(r, high=2) * 0,
        kv_start=ks, kv_len=(torch.diff(ks, append=torch.tensor([pk])) - draw(b, c)).clamp(min=0),
        count=count, n_full=n_full, index=torch.stack([torch.randperm(c, generator=g)[:k] for _ in range(b * h * r)]).view(b, h, r, k),
        **extra,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_mask_is_the_literal_reading_of_the_fields(seed):
    p = random_plan(seed)
    mask = p.mask()
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            assert torch.equal(mask[b, h], literal_mask(p, b, h))


@pytest.mark.parametrize("seed", range(24))
def test_density_is_the_share_of_the_mask(seed):
    p = random_plan(seed)
    assert p.density == pytest.approx(p.mask().double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(0, 24, 3))
def test_ordered_plans_speak_of_positions(seed):
    p = random_plan(seed)
    if p.q_order is not None and p.q_positions != p.n_queries:
        pytest.skip("padding has no place in an ordered plan")
    ordered = dataclasses.replace(p, ordered=True)
    assert torch.equal(ordered.mask()[0, 0], literal_mask(ordered))


def test_known_pairs_are_believed_and_forgotten_when_keys_change():
    p = plan(pairs=30)
    assert p.density == 30 / 120
    assert p.with_kv_len(p.kv_len).pairs is None


def test_visits_and_visited_count_whole_tiles():
    p = plan(dense_rows=((1, 2),))
    assert p.visits()[0, 0].tolist() == [[True, False, True, False], [True] * 4, [True] * 4]
    assert p.visited == pytest.approx((2 + 4 + 4) * 128 * 64 / 120)


def test_complement_visits_the_rest_and_twice_is_the_same():
    p = plan(dense_rows=((1, 2),))
    rest = p.complement()
    assert torch.equal(rest.visits(), ~p.visits())
    assert torch.equal(rest.mask(), ~p.mask())
    assert torch.equal(rest.complement().visits(), p.visits())


def test_complement_of_partial_entries_is_refused():
    p = plan(n_full=torch.tensor([1, 1, 4]), row_bits=torch.full((1, 1, 10, 1), 15, dtype=torch.int32))
    with pytest.raises(PlanError, match="no block"):
        p.complement()


def test_key_counts_per_sample_cut_keys_and_keep_the_rest():
    p = plan()
    short = p.with_kv_len(torch.tensor([[3, 3, 2, 4], [3, 0, 2, 1]], dtype=torch.int32))
    assert short.index is p.index and short.max_kv_len == p.max_kv_len and short.max_q_len == p.max_q_len
    mask = short.mask()
    assert torch.equal(mask[0], p.mask()[0])
    assert torch.equal(mask[1, 0], literal_mask(short, 1))
    assert short.density == pytest.approx(mask.double().mean().item())


def test_batch_and_head_dimensions_are_shared_when_one():
    p = plan(
        kv_len=torch.tensor([[3, 3, 2, 4], [1, 3, 2, 4]]),
        count=torch.tensor([[[2, 1, 4], [1, 1, 4], [0, 1, 1]]]),
        n_full=torch.tensor([[[2, 1, 4], [1, 1, 4], [0, 1, 1]]]),
    )
    assert p.mask().shape == (2, 3, 10, 12)
    assert (p.kv_len.shape, p.count.shape, p.index.shape) == ((2, 1, 4), (1, 3, 3), (1, 1, 3, 4))


def test_rows_without_keys_are_legal_until_keys_are_required():
    p = plan(count=torch.tensor([2, 0, 4]), n_full=torch.tensor([2, 0, 4]))
    assert not p.mask()[0, 0, 4:7].any()
    with pytest.raises(PlanError, match="query block 1 of batch 0, head 0 visits no key"):
        p.require_keys()
    assert plan().require_keys() is not None
    with pytest.raises(PlanError, match="visits no key"):
        plan(kv_len=torch.tensor([3, 3, 2, 0])).require_keys()


def test_uncovered_queries_are_known_and_refused_when_keys_are_required():
    p = plan(q_len=torch.tensor([4, 2, 3]))
    assert not p.covers and not p.mask()[0, 0, 6].any()
    with pytest.raises(PlanError, match="lie in no block"):
        p.require_keys()
    assert plan().covers


def test_empty_blocks_are_legal_anywhere():
    p = plan(kv_len=torch.tensor([3, 0, 2, 4]), q_len=torch.tensor([4, 0, 3]))
    assert not p.mask()[0, 0, :, 3:6].any() and not p.mask()[0, 0, 4:7].any()


def test_moving_keeps_every_field():
    p = dataclasses.replace(random_plan(21), label="x")
    moved = p.to("cpu")
    assert torch.equal(moved.mask(), p.mask()) and moved.label == "x" and str(moved) == str(p)


def test_one_line_says_what_it_is():
    text = str(plan(label="grat-B"))
    assert text.startswith("grat-B: 10 x 12 tokens, 3 x 4 blocks, density 0.567") and "\n" not in text


BAD = [
    (
        dict(index=torch.tensor([[0, 4, 0, 0], [3, 0, 0, 0], [0, 1, 2, 3]])),
        r"index.* is 4; the plan has key blocks 0\.\.3",
    ),
    (dict(index=torch.tensor([[0, -1, 0, 0], [3, 0, 0, 0], [0, 1, 2, 3]])), r"is -1; the plan has key blocks"),
    (dict(index=torch.tensor([[0, 0, 1, 1], [3, 0, 0, 0], [0, 1, 2, 3]])), "same key block twice"),
    (dict(count=torch.tensor([2, 1, 5])), r"count must lie in 0\.\.4"),
    (dict(count=torch.tensor([-1, 1, 4])), r"count must lie in 0\.\.4"),
    (dict(n_full=torch.tensor([3, 1, 4])), r"n_full must lie in 0\.\.count"),
    (dict(n_full=torch.tensor([1, 1, 4])), "neither box nor row_bits"),
    (dict(q_len=torch.tensor([5, 3, 3])), "two query blocks overlap"),
    (dict(kv_len=torch.tensor([4, 3, 2, 4])), "two key blocks overlap"),
    (dict(kv_len=torch.tensor([3, 3, 2, 5])), r"key blocks reach positions 0\.\.13"),
    (dict(q_start=torch.tensor([-1, 4, 7])), "query blocks reach positions -1"),
    (dict(kv_len=torch.tensor([3, 3, 2])), "kv_len describes 3 blocks"),
    (dict(count=torch.tensor([2, 1])), "count describes 2 blocks"),
    (dict(index=torch.zeros(2, 4, dtype=torch.int32)), "index has 2 rows"),
    (dict(index=torch.zeros(4, dtype=torch.int32)), r"index has shape \(4,\)"),
    (dict(q_start=[0, 4, 7]), "q_start is list"),
    (dict(dense_rows=((2, 4),)), r"range \(2, 4\) lies outside the 3 query blocks"),
    (dict(q_order=torch.arange(9)), "must name each|reach positions"),
    (dict(kv_order=torch.tensor([0, 0, *range(2, 12)])), "each of the 12 tokens exactly once"),
    (dict(kv_order=torch.tensor([12, *range(1, 12)])), r"outside -1\.\.11"),
    (dict(row_bits=torch.zeros(1, 1, 10, 2, dtype=torch.int32)), "row_bits has shape"),
    (
        dict(box=Box(*[torch.zeros(2, n, dtype=torch.int16) for n in (10, 10, 11)])),
        r"box.coord has shape \(2, 11\); \[2, 12\]",
    ),
    (dict(block_bias=torch.zeros(1, 1, 3)), "block_bias ends in"),
    (dict(key_bias=torch.zeros(1, 1, 11)), r"\[B, H, 12\] is needed"),
    (
        dict(proxies=Proxies(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4))),
        "one per key block",
    ),
    (
        dict(proxies=Proxies(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 3))),
        "one count per key block",
    ),
    (dict(n_queries=-1), "must not be negative"),
]


@pytest.mark.parametrize("change, words", BAD, ids=[w for _, w in BAD])
def test_plans_that_cannot_be_right_are_refused_in_one_sentence(change, words):
    with pytest.raises(PlanError, match=words) as error:
        plan(**change)
    assert "\n" not in str(error.value)


def test_trusted_plans_check_shapes_only_and_validate_checks_the_rest():
    wrong = plan(index=torch.full((3, 4), 9), trusted=True)
    with pytest.raises(PlanError, match="is 9"):
        wrong.validate()
    with pytest.raises(PlanError, match="3 blocks"):
        plan(kv_len=torch.tensor([3, 3, 2]), trusted=True)


def test_lists_that_do_not_ascend_are_put_down_as_such():
    assert plan().list_order == "address"
    assert plan(index=torch.tensor([[2, 0, 0, 0], [3, 0, 0, 0], [0, 1, 2, 3]])).list_order == "priority"
    parts = {"n_full": torch.tensor([1, 1, 4]), "row_bits": torch.full((1, 1, 10, 1), 15, dtype=torch.int32)}
    two_parts = plan(index=torch.tensor([[2, 0, 0, 0], [3, 0, 0, 0], [0, 1, 2, 3]]), **parts)
    assert two_parts.list_order == "address"


@pytest.mark.parametrize("order", ["address", "priority"])
def test_an_operator_sees_the_plan_that_it_is_given(order):
    from foveal.kernels.block_sparse.operator import flatten, unflatten

    before = plan(list_order=order, dense_rows=((1, 2),))
    after = unflatten(*flatten(before), None, None)
    for field in dataclasses.fields(before):
        if field.init and field.name not in ("label", "pairs"):
            old, new = getattr(before, field.name), getattr(after, field.name)
            assert (
                torch.equal(old, new)
                if isinstance(old, torch.Tensor)
                else old == pytest.approx(new, abs=1e-3)
                if isinstance(old, float)
                else old == new
            ), field.name
