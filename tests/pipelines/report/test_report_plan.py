"""Laws of the plan view: what it shows is what the plan attends, in the caller's tokens."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from foveal.kernels.block_sparse import BlockPlan, Proxies
from foveal.pipelines.report.plan_data import FULL, MASKED, NOT, PARTIAL, PROXY, plan_view
from foveal.pipelines.report.plan_view import centre, raster, still
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import Site, Span, State

GRID = (4, 6, 6)
Make = Callable[..., BlockPlan]


def method_plan(method: object, text: int = 0, text_first: bool = True) -> tuple[BlockPlan, int]:
    """The plan of a method on GRID with text before or after it, and where the grid starts."""
    n = int(np.prod(GRID))
    at = text if text_first else 0
    words = Span(0, text) if text_first else Span(n, n + text)
    site = Site(
        role="joint", name="a", layer=0, layers=1, step=0, steps=1, branch=None, grid=GRID, visual=Span(at, at + n),
        text=words if text else None, valid_text=None, extra=(), ordered=False, scale=None, layer_id=torch.tensor(0),
    )  # fmt: skip
    q = torch.zeros(1, 1, n + text, 16)
    plan = method.plan(q, q, q, site, State())  # type: ignore[attr-defined]
    assert plan is not None
    return plan, at


METHODS = {
    "grat-b": GRAT(group=(2, 3, 3), pattern="B", b=1),
    "grat-x": GRAT(group=(2, 3, 3), pattern="X"),
    "neighbourhood": Neighborhood(window=(3, 5, 5), tile=(2, 3, 3)),
}


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("name", METHODS)
def test_the_view_shows_exactly_the_attended_keys(name: str, text: int, first: bool) -> None:
    plan, at = method_plan(METHODS[name], text, first)
    view = plan_view(plan, GRID, at)
    assert view is not None
    mask = plan.mask()[0, 0].numpy()
    shown = np.stack([np.isin(view.states(q), (FULL, PARTIAL)) for q in range(plan.n_queries)])
    assert (shown == mask).all()


@pytest.mark.parametrize("first", [True, False])
def test_the_start_of_the_grid_is_found_without_being_told(first: bool) -> None:
    plan, at = method_plan(METHODS["grat-b"], 7, first)
    view = plan_view(plan, GRID)
    assert view is not None and view.visual == at


def test_masked_keys_are_visited_and_not_attended(make_plan: Make) -> None:
    plan = make_plan((4, 8, 8), 1, partial=True)
    view = plan_view(plan, (4, 8, 8), 0)
    assert view is not None
    states = view.states(centre(view))
    visited = plan.visits()[0, 0, int(view.q_block[centre(view)])].numpy()
    assert {PARTIAL, MASKED, FULL, NOT} == set(states.tolist())
    assert (np.isin(states, (FULL, PARTIAL, MASKED)) == visited[view.k_block]).all()


def test_proxies_stand_for_what_is_not_listed(make_plan: Make) -> None:
    plan = make_plan((4, 2, 2), 1)
    pooled = torch.zeros(1, 1, 4, 16)
    plan = dataclasses.replace(plan, proxies=Proxies(pooled, pooled, torch.tensor([[[4.0, 4.0, 4.0, 0.0]]])))
    view = plan_view(plan, (4, 2, 2), 0)
    assert view is not None
    assert view.states(0).reshape(4, 4)[:, 0].tolist() == [FULL, FULL, PROXY, NOT]


def test_row_bits_decide_partial_entries(make_plan: Make) -> None:
    plan = make_plan((4, 2, 2), 1)
    bits = torch.zeros(1, 1, 16, 1, dtype=torch.int32)
    bits[..., 0] = 0b0001
    plan = dataclasses.replace(plan, n_full=torch.zeros_like(plan.n_full), row_bits=bits)
    view = plan_view(plan, (4, 2, 2), 0)
    assert view is not None
    assert view.states(0).reshape(4, 4)[:, 0].tolist() == [PARTIAL, MASKED, NOT, NOT]


def test_a_plan_of_another_grid_is_not_drawn(make_plan: Make) -> None:
    assert plan_view(make_plan((4, 2, 2), 1), (5, 2, 2), 0) is None


def test_the_still_picture_marks_the_querys_own_block(make_plan: Make) -> None:
    view = plan_view(make_plan((4, 2, 3), 1), (4, 2, 3), 0)
    assert view is not None
    volume = raster(view, centre(view))
    assert (volume[2] == -1).all() and (volume[[1, 3]] == FULL).all() and (volume[0] == NOT).all()
    uri = still(view)
    assert uri.startswith("data:image/png;base64,") and base64.b64decode(uri.partition(",")[2])[1:4] == b"PNG"
