"""Laws of plan files and plan pictures."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foveal.kernels.block_sparse import BlockPlan, PlanError, Proxies
from foveal.plugins.layout import Layout
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.plans.file import PlanFileError, load_plan, save_plan
from foveal.plugins.plans.picture import COLOURS, draw_block_map, draw_plan
from foveal.plugins.plans.seen import FULL, MASKED, NOT_VISITED, PARTIAL, PROXY, QUERY, seen_from
from foveal.plugins.site import Span


def rich_plan():
    """Every optional field at once."""
    g = torch.Generator().manual_seed(0)
    c = 4
    return BlockPlan(
        n_queries=10, n_keys=8,
        q_start=torch.tensor([0, 4, 7]), q_len=torch.tensor([4, 3, 3]),
        kv_start=torch.tensor([0, 2, 5, 6]), kv_len=torch.tensor([2, 3, 1, 2]),
        count=torch.tensor([[[1, 2, 0]], [[2, 1, 0]]]), n_full=torch.tensor([[[1, 1, 0]], [[0, 1, 0]]]),
        index=torch.tensor([[[[0, 0], [1, 3], [0, 0]]], [[[3, 2], [1, 1], [0, 0]]]]),
        list_order="priority", q_order=torch.randperm(10, generator=g), kv_order=torch.randperm(8, generator=g),
        dense_rows=((2, 3),), row_bits=torch.randint(0, 16, (1, 1, 10, 1), generator=g, dtype=torch.int32),
        block_bias=torch.randn(1, 1, c, generator=g), key_bias=torch.randn(1, 1, 8, generator=g),
        proxies=Proxies(torch.randn(2, 1, c, 4), torch.randn(2, 1, c, 4), torch.ones(1, 1, c), torch.rand(2, 1, c, 4)),
        label="rich",
    )  # fmt: skip


def tensors_of(plan):
    held = {n: getattr(plan, n) for n in plan.__dataclass_fields__}
    for outer in ("box", "proxies"):
        inner = held.pop(outer)
        if inner is not None:
            held |= {f"{outer}.{n}": getattr(inner, n) for n in inner.__dataclass_fields__}
    return held


@pytest.mark.parametrize(
    "plan", [rich_plan(), Neighborhood(window=3, tile=2).static_plan(Layout.joint((5, 6), 7)).plan], ids=["rich", "box"]
)
def test_files_keep_every_field(plan, tmp_path):
    path = tmp_path / "plan.safetensors"
    save_plan(path, plan, grid=(1, 5, 6), visual=Span(0, 30), method="neighborhood", step=3)
    again, info = load_plan(path)
    assert info == {"grid": (1, 5, 6), "visual": Span(0, 30), "method": "neighborhood", "step": 3}
    before, after = tensors_of(plan), tensors_of(again)
    assert before.keys() == after.keys()
    for name, x in before.items():
        y = after[name]
        assert torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y, name
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_a_loaded_plan_is_the_same_mask(tmp_path):
    plan = GRAT(group=2, pattern="X", tile=3).static_plan(Layout.joint((5, 6), 4, True)).plan
    save_plan(tmp_path / "p", plan)
    assert torch.equal(load_plan(tmp_path / "p")[0].mask(), plan.mask())


def damaged(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "noise":
        path.write_bytes(b"\x93NUMPY not a plan")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        save_file({"weight": torch.zeros(3)}, str(path))
    else:
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        head = json.loads(header["__metadata__"]["foveal.plan"])
        if how == "version":
            head["version"] = 99
        elif how == "no plan":
            del head["plan"]
        elif how == "wrong length":
            head["plan"]["n_keys"] = 7
        header["__metadata__"]["foveal.plan"] = "{" if how == "bad json" else json.dumps(head)
        packed = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(packed)) + packed + raw[8 + size :])


@pytest.mark.parametrize(
    "how", ["missing", "cut", "noise", "empty", "foreign", "version", "no plan", "wrong length", "bad json"]
)
def test_damaged_files_are_refused_in_one_sentence(how, tmp_path):
    path = tmp_path / "plan.safetensors"
    save_plan(path, rich_plan())
    damaged(path, how)
    with pytest.raises(PlanFileError, match="plan") as error:
        load_plan(path)
    assert "\n" not in str(error.value)


def test_facts_that_are_not_plain_data_are_refused(tmp_path):
    with pytest.raises(PlanFileError, match="plain data"):
        save_plan(tmp_path / "p", rich_plan(), method=torch.zeros(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "method",
    [
        GRAT(group=2),
        GRAT(group=2, pattern="X", tile=(3, 2)),
        Neighborhood(window=3, tile=(2, 3)),
        Neighborhood(window=2, dilation=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_global", [0, 4])
def test_what_a_picture_shows_is_what_the_query_attends(method, n_global):
    plan = method.static_plan(Layout.joint((5, 6), n_global, True)).plan
    mask = plan.mask()[0, 0].numpy()
    for query in range(n_global, 30 + n_global, 7):
        state = seen_from(plan, query).state
        assert np.array_equal((state == FULL) | (state == PARTIAL), mask[query])
        assert not mask[query][state == MASKED].any()


def test_proxies_and_dense_rows_are_seen():
    plan = rich_plan()
    query = int(plan.q_order[8])
    assert (seen_from(plan, query).state == FULL).all()
    assert PROXY in seen_from(plan, int(plan.q_order[0])).state


@pytest.mark.parametrize(
    "grid, n_global", [((4, 6), 0), ((1, 8, 8), 5), ((21, 6, 8), 7), ((12,), 0), ((1, 1, 1), 0), ((40, 3, 70), 300)]
)
def test_pictures_have_the_colours_of_their_states(grid, n_global):
    n = int(np.prod(grid))
    plan = (
        Neighborhood(window=tuple(min(3, g) for g in grid), tile=2).static_plan(Layout.joint(grid, n_global, True)).plan
    )
    picture = draw_plan(plan, grid, visual=Span(n_global, n + n_global), width=700)
    assert picture.width == 700 and picture.mode == "RGB"
    found = {tuple(c) for c in np.asarray(picture).reshape(-1, 3)}
    assert tuple(COLOURS[QUERY]) in found
    middle = n_global + int(np.ravel_multi_index([g // 2 for g in grid], grid))
    states = set(seen_from(plan, middle).state.tolist()) - {FULL, PARTIAL}  # those two may hide under the query block
    assert all(tuple(COLOURS[s]) in found for s in states & {NOT_VISITED, MASKED})
    assert draw_block_map(plan).width == 720


def test_pictures_look_the_same_whether_the_host_permutes_or_not():
    layouts = [Layout((5, 6), Span(0, 30), ordered=o) for o in (False, True)]
    a, b = (draw_plan(GRAT(group=2).static_plan(x).plan, (5, 6), title="x") for x in layouts)
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_pictures_of_many_blocks_fit_their_width():
    plan = GRAT(group=(3, 5, 4), pattern="X").static_plan(Layout.joint((21, 30, 52))).plan
    assert draw_block_map(plan, width=300).width == 300
    assert draw_plan(plan, (21, 30, 52), width=400, max_frames=4).width == 400


def test_a_grid_that_does_not_fit_is_refused():
    plan = GRAT(group=2).static_plan(Layout.joint((5, 6))).plan
    with pytest.raises(PlanError, match="5x7 has 35 tokens; the plan has 30 keys"):
        draw_plan(plan, (5, 7))
