"""Settings of grouped attention: densities, budgets, defaults, presets, and what is refused."""

import math
import warnings

import pytest
import torch
from grid_oracle import group_mask, qkv

from foveal.kernels.block_sparse import KernelOptions
from foveal.plugins import functional
from foveal.plugins.layout import Layout
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.site import MethodError, Span

TORCH = KernelOptions(implementation="torch")


def grat_attention(*args, **call):
    return functional.grat_attention(*args, **{"options": TORCH, **call})


# grid, group, B b=1 clip, B b=1 shift, X; in token pairs, also where groups are ragged
DENSITIES = [
    ((64, 64), (16, 16), 0.3906, 0.5625, 0.4375),
    ((64, 64), (8, 8), 0.1182, 0.1406, 0.2344),
    ((128, 128), (16, 16), 0.1182, 0.1406, 0.2344),
    ((256, 256), (16, 16), 0.0323, 0.0352, 0.1211),
    ((512, 512), (16, 16), 0.0084, 0.0088, 0.0615),
    ((32, 48, 80), (4, 8, 8), 0.0428, 0.0562, 0.3437),
    ((33, 45, 80), (4, 8, 8), 0.0429, 0.0540, 0.3418),
    ((33, 45, 80), (3, 5, 8), 0.0221, 0.0273, 0.2727),
    ((21, 45, 80), (3, 5, 8), 0.0335, 0.0429, 0.3143),
    ((21, 30, 52), (4, 8, 8), 0.1295, 0.1834, 0.4806),
]


@pytest.mark.parametrize("grid, group, clip, shift, cross", DENSITIES)
def test_densities_are_the_published_formula(grid, group, clip, shift, cross):
    n = math.prod(grid)
    for knobs, expected in ((dict(), clip), (dict(boundary="shift"), shift), (dict(pattern="X"), cross)):
        pairs = GRAT(group=group, **knobs).setting(grid).pairs
        assert pairs / n**2 == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "grid, group", [((7, 10), (2, 3)), ((5, 6, 9), (2, 4, 4)), ((1, 7, 10), (1, 2, 3)), ((4, 1, 5), (2, 1, 2))]
)
@pytest.mark.parametrize(
    "knobs", [dict(), dict(b=(0, 1, -1)), dict(boundary="shift"), dict(pattern="X"), dict(pattern="X-lines")], ids=str
)
def test_pair_counts_are_exact(grid, group, knobs):
    if isinstance(knobs.get("b"), tuple):
        knobs = dict(knobs, b=knobs["b"][: len(grid)])
    long = [a for a, g in enumerate(grid) if g > 1]

    def squeezed(x):
        return tuple(x[a] for a in long)

    spare = {k: squeezed(v) if isinstance(v, tuple) else v for k, v in knobs.items()}
    assert GRAT(group=group, **knobs).setting(grid).pairs == group_mask(squeezed(grid), squeezed(group), **spare).sum()


def test_criss_cross_lists_are_sorted_and_of_known_length():
    plan = GRAT(group=(2, 3, 5), pattern="X").static_plan(Layout.joint((8, 6, 10))).plan
    n = (4, 2, 2)
    assert (plan.count == math.prod(n) - math.prod(x - 1 for x in n)).all()
    index = plan.index[0, 0]
    for row, count in zip(index, plan.count[0, 0], strict=True):
        assert (row[1:count] > row[: count - 1]).all()
    assert torch.equal(plan.count, plan.n_full)
    assert plan.box is None and plan.row_bits is None


def test_group_offset_moves_the_groups_of_odd_layers():
    grid, method = (7, 10), GRAT(group=(3, 4), group_offset=(1, 2))
    assert method.order((1, 7, 10)) is None
    for layer, offset in ((0, 0), (1, (1, 2))):
        mask = method.static_plan(Layout.joint(grid), layer=layer).plan.mask()[0, 0]
        assert torch.equal(mask, torch.from_numpy(group_mask(grid, (3, 4), offset=offset)))
    with pytest.raises(MethodError, match="stay permuted"):
        method.static_plan(Layout(grid, Span(0, 70), ordered=True))
    with pytest.raises(MethodError, match="below the group"):
        GRAT(group=2, group_offset=2).setting((7, 10), layer=1)


@pytest.mark.parametrize("pattern", ["B", "auto"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("n_global", [0, 256])
def test_a_budget_is_never_exceeded_and_nearly_used(pattern, budget, n_global):
    method = GRAT(density=budget, pattern=pattern)
    plan = method.static_plan(Layout.joint((21, 30, 52), n_global)).plan
    assert budget * 0.8 <= plan.density <= budget
    assert str(method.setting((21, 30, 52), n_global)) == plan.label


def test_a_budget_below_every_setting_is_refused_with_the_least_one():
    with pytest.raises(MethodError, match=r"density 0\.01 is below .* 0\.\d+"):
        GRAT(density=0.01, group=4).setting((8, 8))
    with pytest.raises(MethodError, match="give one of them"):
        GRAT(density=0.1, b=1)


def test_presets_set_the_schedule_and_yield_to_the_caller():
    assert (GRAT(preset="paper").dense_steps, GRAT(preset="paper").dense_layers) == (0, ())
    assert (GRAT(preset="quality").dense_steps, GRAT(preset="quality").dense_layers) == (0.2, (0,))
    assert GRAT(preset="quality", dense_steps=3).dense_steps == 3
    assert GRAT(preset="quality").first_sparse_step(30) == 6
    with pytest.raises(MethodError, match="did you mean 'quality'"):
        GRAT(preset="qualty")


@pytest.mark.parametrize(
    "grid, group",
    [
        ((1, 512, 512), (1, 16, 16)), ((1, 256, 256), (1, 16, 16)), ((1, 128, 128), (1, 16, 16)), ((1, 64, 64), (1, 8, 8)),
        ((32, 48, 80), (4, 8, 8)), ((33, 45, 80), (3, 5, 8)), ((21, 45, 80), (3, 5, 8)), ((21, 30, 52), (3, 5, 4)),
    ],
)  # fmt: skip
def test_default_groups_are_those_of_the_literature(grid, group):
    assert GRAT().setting(grid).group == group


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(group=0), "whole number >= 1"),
        (dict(group=(2, 2.5)), "whole number"),
        (dict(group=True), "whole number"),
        (dict(group=(1, 2, 3, 4)), "three"),
        (dict(b=-2), r"or -1 \(the whole axis\)"),
        (dict(pattern="Y"), "one of B, X, X-lines"),
        (dict(boundary="shft"), "did you mean 'shift'"),
        (dict(tile=0), "whole number"),
    ],
)
def test_bad_knobs_are_refused_in_one_sentence(knobs, words):
    with pytest.raises(MethodError, match=words):
        GRAT(**knobs)


def test_group_rank_must_fit_the_grid():
    with pytest.raises(MethodError, match=r"group \(2, 2\) has 2 entries; the grid 3x4x5 needs 3"):
        GRAT(group=(2, 2)).setting((3, 4, 5))


def test_a_group_beyond_the_grid_is_allowed_and_warned_about():
    with pytest.warns(UserWarning, match="exceeds the grid"):
        assert GRAT(group=(5, 37)).setting((5, 36)).counts == (1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRAT(group=(4, 5, 5)).setting((1, 35, 36))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(grid=(5, 7)), "q has 36 tokens; the grid 5x7 and 6 global tokens make 41"),
        (lambda c: c.update(n_valid=7), r"0\.\.6"),
        (lambda c: c.update(n_valid=-1), r"0\.\.6"),
        (lambda c: c.update(n_valid=torch.tensor([1, 2, 3])), r"one per sample: \(2,\)"),
        (lambda c: c.update(n_valid=torch.tensor([1, 9])), r"must lie in 0\.\.6"),
        (lambda c: c.update(n_global=-6), "n_global is -6"),
        (lambda c: c.update(grid=(0, 6)), "at least 1"),
        (lambda c: c.update(grid=()), "1 to 3"),
        (lambda c: c.update(k=c["k"][:, :, :-1]), "not supported"),
        (lambda c: c.update(k=c["k"].float()), "float"),
        (lambda c: c.update(k=c["k"][..., :4]), "head"),
        (lambda c: c.update(q=c["q"][:, :, :, None]), "dimensions"),
        (lambda c: c.update(q=c["q"].repeat(1, 2, 1, 1)[:, :3]), "heads"),
    ],
)
def test_calls_that_do_not_fit_are_refused_in_one_sentence(change, words):
    q, k, v = qkv(36)
    call = dict(q=q, k=k, v=v, grid=(5, 6), n_global=6)
    change(call)
    with pytest.raises(ValueError, match=words):
        grat_attention(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("grid"), GRAT(group=2), **call)
