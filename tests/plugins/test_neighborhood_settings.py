"""Window rules, settings and refusals of neighbourhood attention."""

import itertools
import math

import numpy as np
import pytest
import torch
from grid_oracle import axis_mask, qkv, window_mask

from foveal.kernels.block_sparse import KernelOptions
from foveal.plugins import functional
from foveal.plugins.layout import Layout
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import MethodError, Site, Span, State
from foveal.plugins.windows import neighborhood_table

TORCH = KernelOptions(implementation="torch")


def neighborhood_attention(*args, **call):
    return functional.neighborhood_attention(*args, **{"options": TORCH, **call})


VECTORS = [
    ((10, 4, 1), "0,4 0,4 0,4 1,5 2,6 3,7 4,8 5,9 6,10 6,10"),
    ((10, 5, 1), "0,5 0,5 0,5 1,6 2,7 3,8 4,9 5,10 5,10 5,10"),
    ((10, 4, 2), "0,4 0,4 1,5 1,5 3,7 3,7 5,9 5,9 6,10 6,10"),
    ((10, 4, 3), "0,4 0,4 0,4 2,6 2,6 2,6 5,9 5,9 5,9 6,10"),
    ((10, 4, 4), "0,4 0,4 0,4 0,4 4,8 4,8 4,8 4,8 6,10 6,10"),
    ((11, 6, 4), "0,6 0,6 0,6 0,6 3,9 3,9 3,9 3,9 5,11 5,11 5,11"),
    ((10, 4, 1, 1, True), "0,1 0,2 0,3 0,4 1,5 2,6 3,7 4,8 5,9 6,10"),
    ((10, 4, 2, 1, True), "0,1 0,2 0,3 0,4 2,5 2,6 4,7 4,8 6,9 6,10"),
]


@pytest.mark.parametrize("axis, windows", VECTORS, ids=str)
def test_published_window_vectors(axis, windows):
    table = neighborhood_table(*axis)
    assert " ".join(f"{a},{b}" for a, b in zip(table.low, table.high, strict=True)) == windows


def test_published_dilation_vector():
    keys = "036 147 258 036 147 258 369 47T 258 369 47T"  # T stands for 10
    mask = torch.from_numpy(axis_mask(11, 3, 1, 3))
    assert [[int(c, 11) if c != "T" else 10 for c in row] for row in keys.split()] == [
        r.nonzero()[:, 0].tolist() for r in mask
    ]
    plan = Neighborhood(window=3, dilation=3).static_plan(Layout.joint((11,))).plan
    assert torch.equal(plan.mask()[0, 0], mask)


def test_tables_are_the_definition_for_every_small_axis():
    cases = 0
    for length, d in itertools.product(range(1, 15), (1, 2, 3, 4)):
        for w in range(1, length // d + 1):
            for s, causal in itertools.product(range(1, w + 1), (False, True)):
                t = neighborhood_table(length, w, s, d, causal)
                seen = (
                    (t.residue[:, None] == t.residue) & (t.low[:, None] <= t.position) & (t.position < t.high[:, None])
                )
                assert np.array_equal(seen, axis_mask(length, w, s, d, causal)), (length, w, s, d, causal)
                assert (seen.sum(1) == w).all() if not causal else (seen.sum(1) >= 1).all() and seen.sum(1).max() <= w
                cases += 1
    assert cases > 1000


def test_odd_windows_with_stride_one_are_inward_sliding_windows():
    half = 2
    i = np.arange(12)
    centre = np.clip(i, half, 12 - 1 - half)
    assert np.array_equal(abs(i[None] - centre[:, None]) <= half, axis_mask(12, 5))


def test_blocked_windows_are_swin_windows():
    x = np.arange(12) // 4
    assert np.array_equal(x[:, None] == x, axis_mask(12, 4, 4))


def test_tile_strides_are_sliding_tile_attention():
    tile = np.arange(20) // 4
    centre = np.clip(tile, 1, 5 - 2)
    assert np.array_equal(abs(tile[None] - centre[:, None]) <= 1, axis_mask(20, 12, 4))


def test_dilation_is_independent_attention_inside_each_class():
    mask = axis_mask(14, 3, 2, 3)
    for r in range(3):
        n = len(range(r, 14, 3))
        assert np.array_equal(mask[r::3, r::3], axis_mask(n, 3, 2))
    assert mask.sum() == 14 * 3


def test_whole_first_axis_is_a_spatial_window_over_all_frames():
    mask = window_mask((3, 6, 7), (-1, 3, 5)).reshape(3, 42, 3, 42)
    assert (mask == window_mask((6, 7), (3, 5))[None, :, None]).all()


# window, stride, dilation on a base grid of (-1, 44, 80) -> on another grid
ADAPTED = [
    ((-1, 12, 24), (1, 4, 8), 1, (21, 45, 80), (21, 12, 24), (1, 4, 8), (1, 1, 1)),
    ((-1, 12, 24), (1, 4, 8), 1, (21, 30, 52), (21, 8, 16), (1, 3, 5), (1, 1, 1)),
    ((-1, 4, 16), 1, (1, 11, 5), (21, 30, 52), (21, 3, 10), (1, 1, 1), (1, 7, 3)),
    ((-1, 28, 56), 1, 1, (33, 45, 80), (33, 29, 56), (1, 1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("window, stride, dilation, grid, w, s, d", ADAPTED)
def test_windows_adapt_to_other_grids_as_published(window, stride, dilation, grid, w, s, d):
    method = Neighborhood(window=window, stride=stride, dilation=dilation, base_grid=(-1, 44, 80))
    found = method.setting(grid)
    assert (found.window, found.stride, found.dilation) == (w, s, d)


def test_a_video_configuration_is_dense_on_images():
    method = Neighborhood(window=(-1, 12, 24), base_grid=(-1, 44, 80))
    q, k, v = qkv(16)
    site = Site("self", "x", 0, 1, (1, 4, 4), Span(0, 16))
    assert method.order((1, 4, 4)) is None and method.plan(q, k, v, site, State()) is None


@pytest.mark.parametrize(
    "how, window, expected",
    [
        ("nearest", (9, 11, 30), (9, 15, 24)),
        ("cover", (9, 11, 30), (9, 15, 40)),
        ("nearest", (20, 44, 17), (21, 45, 24)),
        ("cover", (10, 20, 60), (15, 25, 72)),
    ],
)
def test_snapped_windows_are_fully_block_sparse(how, window, expected):
    grid = (21, 45, 80)
    method = Neighborhood(window=window, snap=how)
    assert method.setting(grid).window == expected
    plan = method.static_plan(Layout.joint(grid)).plan
    assert torch.equal(plan.count, plan.n_full) and plan.box is None


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("n_global", [0, 256])
@pytest.mark.parametrize("grid", [(21, 30, 52), (1, 64, 64), (33, 45, 80)], ids=str)
def test_a_budget_is_never_exceeded_and_buys_whole_tiles(budget, n_global, grid):
    if n_global == 256 and grid[0] == 1 and budget == 0.1:
        pytest.skip("text alone exceeds this budget")
    plan = Neighborhood(density=budget).static_plan(Layout.joint(grid, n_global)).plan
    assert budget * 0.45 <= plan.density <= budget
    assert torch.equal(plan.count, plan.n_full)


def test_no_window_and_no_budget_is_a_quarter():
    assert Neighborhood().setting((21, 30, 52)) == Neighborhood(density=0.25).setting((21, 30, 52))


def test_automatic_tiles_follow_strides_and_the_wanted_size():
    plan = Neighborhood(window=(21, 25, 40), stride=(3, 5, 8)).static_plan(Layout.joint((21, 45, 80))).plan
    assert torch.equal(plan.count, plan.n_full)
    assert Neighborhood(window=(18, 24, 24), stride=(2, 8, 8)).order((30, 48, 80)).tile == (2, 8, 8)
    for block in (64, 128, 256):
        tile = Neighborhood(window=9, block=block).order((1, 64, 64)).tile
        assert block / 2 <= math.prod(tile) <= 2 * block


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(window=0), "or -1"),
        (dict(window=-2), "or -1"),
        (dict(window=True), "whole number"),
        (dict(window=(3, 3.0)), "whole number"),
        (dict(window=3, stride=0), "stride is 0"),
        (dict(window=3, dilation=0), "dilation is 0"),
        (dict(window=3, causal=1), "True or False"),
        (dict(window=3, tile=0), "tile is 0"),
        (dict(window=3, block=8), "16 tokens or more"),
        (dict(window=3, snap="near"), "'cover' or 'nearest'"),
        (dict(window=3, density=0.3), "give one of them"),
        (dict(stride=2), "give window too"),
        (dict(window=3, density=2.0), r"\(0, 1\]"),
    ],
)
def test_bad_knobs_are_refused_in_one_sentence(knobs, words):
    with pytest.raises(MethodError, match=words):
        Neighborhood(**knobs)


@pytest.mark.parametrize(
    "grid, knobs, words",
    [
        ((7, 10), dict(window=8), "axis 0 of the grid 7x10; that axis has 7, so the window is at most 7"),
        ((7, 10), dict(window=(2, 4), dilation=(1, 3)), "axis 1 .* at most 3"),
        ((7, 10), dict(window=3, stride=4), "stride 4 exceeds the window 3 on axis 0"),
        ((7, 10), dict(window=(3, 3, 3)), "has 3 entries; the grid 7x10 needs 2"),
        ((7, 10), dict(density=0.001), "below the smallest window"),
    ],
)
def test_knobs_that_do_not_fit_the_grid_are_refused(grid, knobs, words):
    with pytest.raises(MethodError, match=words):
        Neighborhood(**knobs).setting(grid)


def test_a_base_grid_clips_instead_of_refusing():
    assert Neighborhood(window=(8, 8), base_grid=(8, 8)).setting((4, 16)).window == (4, 16)
    assert Neighborhood(window=20, dilation=2, base_grid=(40, 40)).setting((10, 40)).window == (5, 20)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(extra_k=(2, 2, 3, 16)), "only one of extra_k and extra_v"),
        (dict(extra_k=(1, 2, 3, 16), extra_v=(2, 2, 3, 16)), "must both be"),
        (dict(extra_k=(2, 2, 3, 8), extra_v=(2, 2, 3, 8)), "must both be"),
        (dict(extra_k=(2, 2, 3, 16), extra_v=(2, 2, 4, 16)), "must both be"),
    ],
)
def test_extra_keys_that_do_not_fit_are_refused(change, words):
    q, k, v = qkv(30, batch=2)
    with pytest.raises(MethodError, match=words):
        neighborhood_attention(
            q, k, v, (5, 6), Neighborhood(window=3), **{n: torch.zeros(s, dtype=q.dtype) for n, s in change.items()}
        )


def test_four_axes_and_foreign_key_grids_are_refused():
    q, k, v = qkv(16)
    with pytest.raises(MethodError, match="1 to 3"):
        neighborhood_attention(q, k, v, (2, 2, 2, 2), Neighborhood(window=1))
    with pytest.raises(MethodError, match="different grids"):
        neighborhood_attention(q, k[:, :, :12], v[:, :, :12], (4, 4), Neighborhood(window=3))
    with pytest.raises(ValueError, match="strided"):
        neighborhood_attention(q.to_sparse(), k, v, (4, 4), Neighborhood(window=3))
