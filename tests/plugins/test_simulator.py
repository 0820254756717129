"""The simulator against the published tables."""

import time

import numpy as np
import pytest
import torch

from foveal.plugins.layout import Layout
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.simulator import search_stride, simulate
from foveal.plugins.site import MethodError

FLUX = dict(grid=(256, 256), window=80, q_tile=(16, 16), kv_tile=(16, 8))
HUNYUAN = dict(grid=(30, 48, 80), window=(18, 24, 24), q_tile=(4, 8, 8), kv_tile=(2, 8, 8))

TABLE = [
    (FLUX, (1, 1), 6.10, 0.518, 1.76, 19 / 28, 1.42),
    (FLUX, (16, 1), 8.53, 0.518, 1.84, 19 / 28, 1.45),
    (FLUX, (16, 16), 10.24, 0.518, 1.88, 19 / 28, 1.46),
    (HUNYUAN, (1, 1, 1), 3.27, 0.607, 1.73, None, None),
    (HUNYUAN, (2, 1, 1), 3.60, 0.607, 1.78, None, None),
    (HUNYUAN, (1, 1, 8), 5.45, 0.607, 1.98, None, None),
    (HUNYUAN, (2, 1, 8), 6.00, 0.607, 2.02, None, None),
    (HUNYUAN, (1, 8, 8), 9.09, 0.607, 2.18, None, None),
    (HUNYUAN, (2, 8, 8), 10.0, 0.607, 2.20, None, None),
    (HUNYUAN, (16, 8, 8), 11.11, 0.607, 2.23, 35 / 50, 1.63),
    (HUNYUAN, (18, 24, 24), 6.67, 0.607, 2.07, None, None),
]


@pytest.mark.parametrize("case, stride, worst, share, e2e, steps, e2e_steps", TABLE)
def test_published_speedups_are_reproduced(case, stride, worst, share, e2e, steps, e2e_steps):
    result = simulate(stride=stride, **case)
    assert result.worst == pytest.approx(worst, abs=0.006)
    assert result.end_to_end(share) == pytest.approx(e2e, abs=0.006)
    assert result.mean >= result.worst
    if steps is not None:
        assert result.end_to_end(share, steps) == pytest.approx(e2e_steps, abs=0.006)


def test_one_dimensional_case_and_its_smallest_full_stride():
    case = dict(grid=(32768,), window=2048, q_tile=128)
    assert simulate(stride=128, **case).worst == pytest.approx(15.06, abs=0.005)
    full = simulate(stride=256, **case)
    assert (full.worst, full.partial_share) == (16.0, 0)
    assert not simulate(stride=192, **case).fully_block_sparse


PRESETS = [
    ((21, 45, 80), (3, 5, 8), (3, 5, 8), (21, 15, 24), 0.100),
    ((21, 45, 80), (3, 5, 8), (3, 5, 8), (21, 25, 40), 0.278),
    ((21, 45, 80), (3, 5, 8), (3, 5, 8), (21, 35, 56), 0.544),
    ((21, 45, 80), (3, 5, 8), (3, 5, 8), (15, 25, 40), 0.198),
    ((21, 45, 80), (3, 5, 8), (3, 5, 8), (9, 15, 24), 0.043),
    ((21, 30, 52), (3, 5, 4), (3, 5, 4), (21, 15, 20), 0.192),
    ((21, 30, 52), (3, 5, 4), (3, 5, 4), (21, 15, 28), 0.269),
    ((21, 30, 52), (3, 5, 4), (3, 5, 4), (21, 25, 36), 0.577),
    ((33, 45, 80), (3, 5, 8), (3, 5, 8), (21, 25, 24), 0.106),
    ((33, 45, 80), (3, 5, 8), (3, 5, 8), (33, 35, 40), 0.389),
    ((33, 45, 80), (3, 5, 8), (3, 5, 8), (15, 15, 24), 0.0455),
    ((30, 48, 80), (2, 8, 8), (2, 8, 8), (18, 24, 24), 0.090),
    ((64, 64), (8, 8), (8, 8), (24, 24), 0.141),
    ((64, 64), (8, 8), (8, 8), (40, 40), 0.391),
    ((128, 128), (8, 8), (8, 8), (40, 40), 0.098),
    ((128, 128), (8, 8), (8, 8), (56, 56), 0.191),
    ((256, 256), (8, 8), (16, 16), (80, 80), 0.098),
    ((256, 256), (16, 8), (16, 16), (80, 80), 0.098),
    ((256, 256), (8, 8), (8, 8), (72, 72), 0.079),
]


@pytest.mark.parametrize("grid, tile, stride, window, density", PRESETS)
def test_presets_are_fully_block_sparse(grid, tile, stride, window, density):
    result = simulate(grid, window, stride, q_tile=tile)
    assert result.density == pytest.approx(density, abs=5e-4)
    assert result.partial_share == 0 and result.visited == result.density
    plan = Neighborhood(window=window, stride=stride, tile=tile).static_plan(Layout.joint(grid)).plan
    assert torch.equal(plan.count, plan.n_full) and plan.box is None
    tokens = (plan.q_len[0, 0].long()[:, None] * plan.kv_len[0, 0].long() * plan.visits()[0, 0]).sum()
    assert int(tokens) == plan.pairs


def test_stride_one_visits_what_the_literature_says():
    assert simulate((64, 64), 24, q_tile=8).visited == pytest.approx(0.282, abs=5e-4)
    assert simulate((64, 64), 24, q_tile=8).partial_share == pytest.approx(0.83, abs=5e-3)
    assert simulate((30, 48, 80), (18, 24, 24), q_tile=(2, 8, 8)).visited == pytest.approx(0.184, abs=5e-4)


@pytest.mark.parametrize(
    "knobs",
    [
        dict(window=(3, 4, 5), stride=(1, 2, 3)),
        dict(window=2, dilation=(1, 2, 3)),
        dict(window=3, causal=(True, False, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("tile", [(2, 3, 4), (3, 4, 7)])
def test_simulated_visits_are_those_of_the_plan(knobs, tile):
    grid = (5, 6, 9)
    result = simulate(grid, **knobs, q_tile=tile)
    plan = Neighborhood(**knobs, tile=tile).static_plan(Layout.joint(grid)).plan
    visits = plan.visits()[0, 0]
    tokens = plan.q_len[0, 0].long()[:, None] * plan.kv_len[0, 0].long() * visits
    assert result.visited == pytest.approx(int(tokens.sum()) / 270**2)
    assert result.worst == pytest.approx(plan.n_kv_blocks / int(plan.count.max()))
    assert result.mean == pytest.approx(plan.n_kv_blocks / float(plan.count.double().mean()))
    assert result.partial_share == pytest.approx(1 - int(plan.n_full.sum()) / int(plan.count.sum()))
    assert result.density == pytest.approx(plan.density)


def test_dynamic_tiles_count_the_union_box():
    w, tile, length = 7, 3, 20
    lo = np.clip(np.arange(length) - w // 2, 0, length - w)
    visited = [-(-(lo[a : a + 4].max() + w - lo[a : a + 4].min()) // tile) for a in range(0, length, 4)]
    result = simulate((length,), w, q_tile=4, kv_tile=tile, mode="dynamic")
    assert result.worst == pytest.approx(-(-length // tile) / max(visited))
    assert result.mean == pytest.approx(-(-length // tile) / np.mean(visited))


def test_dynamic_tiles_are_full_when_tiles_divide_window_and_stride():
    assert simulate((60,), 12, 4, q_tile=4, kv_tile=6, mode="dynamic").fully_block_sparse
    assert not simulate((60,), 12, 4, q_tile=4, kv_tile=5, mode="dynamic").fully_block_sparse
    assert not simulate((60,), 12, 4, q_tile=3, kv_tile=6, mode="dynamic").fully_block_sparse


def test_found_strides_each_earn_their_place():
    start = time.perf_counter()
    found = search_stride(**HUNYUAN)
    assert time.perf_counter() - start < 2
    assert found[0].window.stride == (1, 1, 1)
    assert found[-1].window.stride == (16, 8, 8) and found[-1].fully_block_sparse
    assert [r.worst for r in found] == sorted(r.worst for r in found)
    equal = search_stride((30, 48, 80), (18, 24, 24), q_tile=(2, 8, 8))
    assert equal[-1].window.stride == (2, 8, 8)


def test_whole_windows_gain_nothing():
    result = simulate((8, 8), -1, q_tile=4)
    assert (result.flop_speedup, result.worst, result.mean, result.partial_share) == (1, 1, 1, 0)
    assert result.end_to_end(0.5) == 1


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(window=9, q_tile=4), "at most 8"),
        (dict(window=4, q_tile=0), "q_tile is 0"),
        (dict(window=4, q_tile=4, mode="other"), "'static' or 'dynamic'"),
        (dict(window=4, dilation=2, q_tile=4, mode="dynamic"), "know no dilation"),
    ],
)
def test_bad_cases_are_refused_in_one_sentence(knobs, words):
    with pytest.raises(MethodError, match=words):
        simulate((8, 8), **knobs)
