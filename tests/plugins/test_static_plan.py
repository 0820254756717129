"""Laws of plans made from coordinates: spans, text lengths, caches, and what they refuse."""

import time

import pytest
import torch

from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention
from foveal.plugins.layout import Layout
from foveal.plugins.methods.dense import Dense
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.order import order_of
from foveal.plugins.site import MethodError, Site, Span, State
from foveal.plugins.static_plan import static_plan

METHODS = [
    GRAT(group=(1, 2, 3)),
    GRAT(group=(1, 2, 3), pattern="X"),
    Neighborhood(window=(1, 3, 3)),
    Neighborhood(window=2, dilation=(1, 2, 1)),
]
GRID, N = (2, 5, 6), 60


def site(**knobs):
    base = dict(role="joint", name="blocks.0.attn", layer=0, layers=2, grid=GRID, visual=Span(0, N))
    return Site(**{**base, **knobs})


LAYOUTS = {
    "alone": dict(),
    "text last": dict(text=Span(N, N + 9)),
    "text first": dict(visual=Span(9, 9 + N), text=Span(0, 9)),
    "text first, reference last": dict(visual=Span(9, 9 + N), text=Span(0, 9), extra=(Span(9 + N, 9 + N + 4),)),
    "prefix, grid, reference, text": dict(
        visual=Span(2, 2 + N), text=Span(6 + N, 11 + N), extra=(Span(2 + N, 6 + N), Span(0, 2))
    ),
    "empty text": dict(text=Span(N, N)),
}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("where", LAYOUTS)
def test_global_tokens_see_and_are_seen_wherever_they_lie(method, where):
    here = site(**LAYOUTS[where])
    alone = method.static_plan(Layout.of(site())).plan.mask()[0, 0]
    mask = method.static_plan(Layout.of(here)).plan.mask()[0, 0]
    grid = torch.arange(here.visual.start, here.visual.stop)
    assert torch.equal(mask[grid][:, grid], alone)
    other = torch.ones(here.tokens, dtype=torch.bool)
    other[grid] = False
    assert mask[other].all() and mask[:, other].all()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("where", LAYOUTS)
def test_ordered_plans_are_the_same_plan_over_permuted_tokens(method, where):
    here = site(**LAYOUTS[where])
    plain = method.static_plan(Layout.of(here)).plan
    ordered = method.static_plan(Layout.of(site(**LAYOUTS[where], ordered=True))).plan
    assert ordered.ordered or ordered.kv_order is None or method.pattern == "X"
    put = torch.arange(here.tokens)
    put[here.visual.start : here.visual.stop] = method.order(GRID).token + here.visual.start
    assert torch.equal(plain.mask()[0, 0][put][:, put], ordered.mask()[0, 0])
    assert plain.pairs == ordered.pairs


def test_text_lengths_shorten_keys_and_rebuild_nothing():
    method = GRAT(group=(1, 2, 3))
    here = site(text=Span(N, N + 600))
    static = method.static_plan(Layout.of(here))
    plan = static.with_valid_text(torch.tensor([0, 255, 256, 600]))
    assert plan.index is static.plan.index and plan.count is static.plan.count
    text = plan.kv_start[0, 0] >= N
    assert int(text.sum()) > 1
    assert plan.kv_len[:, 0, text].sum(-1).tolist() == [0, 255, 256, 600]
    assert torch.equal(plan.kv_len[:, 0, ~text], static.plan.kv_len[0, :, ~text].expand(4, -1))
    seen = plan.mask()[1, 0]
    assert seen[:, N : N + 255].all() and not seen[:, N + 255 :].any()
    assert static.with_valid_text(None) is static.plan


def test_text_queries_are_dense_rows():
    plan = METHODS[0].static_plan(Layout.of(site(**LAYOUTS["text first, reference last"]))).plan
    assert plan.dense_rows == ((0, 1), (plan.n_q_blocks - 1, plan.n_q_blocks))
    assert plan.count[0, 0, 0] == 0 and plan.q_len[0, 0, 0] == 9


def test_lists_are_sorted_full_entries_first():
    plan = Neighborhood(window=(1, 3, 3), tile=(1, 2, 3)).static_plan(Layout.of(site(text=Span(N, N + 9)))).plan
    assert bool((plan.n_full < plan.count).any())
    for row, full, count in zip(plan.index[0, 0], plan.n_full[0, 0], plan.count[0, 0], strict=True):
        for part in (row[:full], row[full:count]):
            assert (part[1:] > part[:-1]).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_plan_is_made_once_per_layout(method):
    q = torch.zeros(1, 1, N, 4)
    first = method.plan(q, q, q, site(), State())
    assert method.plan(q, q, q, site(layer=1, step=3), State()) is first
    assert type(method)(**method.knobs()).plan(q, q, q, site(), State()) is first
    other = site(grid=(3, 4, 5))
    assert method.plan(q, q, q, other, State()) is not first


def test_plans_of_720p_video_are_made_in_time_and_found_at_once():
    layout = Layout((33, 45, 80), Span(0, 118800), text=Span(118800, 119056))
    for method in (GRAT(group=(3, 5, 8)), GRAT(group=(3, 5, 8), pattern="X"), Neighborhood(window=(9, 11, 13))):
        start = time.perf_counter()
        method.static_plan(layout)
        assert time.perf_counter() - start < 2
        start = time.perf_counter()
        for _ in range(100):
            method.static_plan(Layout((33, 45, 80), Span(0, 118800), text=Span(118800, 119056)), torch.device("cpu"))
        assert time.perf_counter() - start < 100 * 50e-6


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(grid=(2, 5, 7)), r"2x5x7 has 70 tokens; the visual span \(0, 60\) has 60"),
        (dict(text=Span(N + 1, N + 4)), "61, 60 was due"),
        (dict(text=Span(N - 1, N + 4)), "59, 60 was due"),
        (dict(visual=Span(1, 61)), "1, 0 was due"),
    ],
)
def test_spans_that_do_not_tile_the_sequence_are_refused(knobs, words):
    with pytest.raises(MethodError, match=words):
        METHODS[0].static_plan(Layout.of(site(**knobs)))


def test_a_plan_never_serves_another_length_or_grid():
    q = torch.zeros(1, 1, N + 1, 4)
    for method in METHODS:
        with pytest.raises(MethodError, match="q has 61 tokens; the grid 2x5x6 and 0 global tokens make 60"):
            method.plan(q, q, q, site(), State())
    with pytest.raises(MethodError, match="a plan needs one grid"):
        static_plan(Layout.of(site()), order_of((2, 6, 5), (1, 2, 3)), lambda chosen: None)


def test_dense_and_dense_patterns_leave_the_call_to_the_host():
    q = torch.zeros(1, 1, N, 4)
    assert Dense().plan(q, q, q, site(), State()) is None
    assert GRAT(pattern="dense").plan(q, q, q, site(), State()) is None
    assert Dense().attend(q, q, q, site(), State()) is None


def test_the_cross_pattern_with_its_own_tiles_works_under_an_ordered_host():
    method = GRAT(group=(1, 2, 3), pattern="X", tile=(2, 2, 4))
    here = site(text=Span(N, N + 3))
    x = torch.randn(1, 2, N + 3, 8, dtype=torch.float64)
    order = method.order(GRID)
    put = torch.cat([order.token, torch.arange(N, N + 3)])
    torch_only = KernelOptions(implementation="torch")
    plain = block_sparse_attention(x, x, x, method.plan(x, x, x, here, State()), options=torch_only)
    y = x[:, :, put]
    plan = method.plan(y, y, y, site(text=Span(N, N + 3), ordered=True), State())
    assert (block_sparse_attention(y, y, y, plan, options=torch_only) - plain[:, :, put]).abs().max() < 1e-12
