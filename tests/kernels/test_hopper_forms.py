"""What the Hopper kernel is given: packed boxes say what boxes say, rows of a table lie where the tensor's rows lie."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from plan_fuzz import Recipe, make_case
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, Box, PlanError, block_sparse_attention, choose, hopper_call, needs
from foveal.kernels.block_sparse.hopper_call import plan_arguments, programs_for
from foveal.kernels.block_sparse.launching import facts
from foveal.kernels.block_sparse.plan_forms import cell_width, cells, fields, lead, listed_words, packed_box, row_facts
from foveal.kernels.block_sparse.tiles import fill, hopper_keys, row_table
from foveal.plugins.layout import Layout
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import Site, Span


def plan_of(box: Box | None = None, n: int = 40, m: int = 40, length: int = 8) -> BlockPlan:
    q, k = (torch.arange(0, x, length, dtype=torch.int32) for x in (n, m))
    ends = lambda start, x: (x - start).clamp(max=length).int()  # noqa: E731
    full = torch.zeros_like(q) if box is not None else torch.full_like(q, k.numel())
    return BlockPlan(
        n_queries=n, n_keys=m, q_start=q, q_len=ends(q, n), kv_start=k, kv_len=ends(k, m), count=torch.full_like(q, k.numel()),
        n_full=full, index=torch.arange(k.numel(), dtype=torch.int32).repeat(q.numel(), 1), box=box,
    )  # fmt: skip


@pytest.mark.parametrize("axes, top", [(1, 300), (2, 255), (3, 80), (4, 100), (5, 3), (1, 30000)])
@pytest.mark.parametrize("seed", range(5))
def test_packed_boxes_say_what_boxes_say(axes: int, top: int, seed: int):
    gen = torch.Generator().manual_seed(seed)
    ints = lambda low, high, n: torch.randint(low, high, (axes, n), generator=gen).short()  # noqa: E731
    low = ints(-3, top + 3, 40)
    box = Box(low, low + ints(-2, top, 40), ints(0, top + 1, 40))
    packed = packed_box(plan_of(box))
    assert packed is not None
    where, lows, highs = packed.coord[None], packed.low[:, None], packed.high[:, None]
    inside = ((where - lows) & (highs - where) & packed.guard) == packed.guard
    coord = box.coord[:, None]
    assert torch.equal(inside, ((box.low[..., None] <= coord) & (coord < box.high[..., None])).all(0))
    assert not (((packed.guard - lows) & (highs - packed.guard) & packed.guard) == packed.guard).any()


def test_coordinates_that_need_more_than_32_bits_are_refused():
    coord = torch.full((3, 40), 2000, dtype=torch.int16)
    box = Box(coord, coord + 1, coord)
    assert fields(box) is None and packed_box(plan_of(box)) is None


def windows(tile: tuple[int, int, int], grid: tuple[int, int, int] = (4, 8, 12)) -> BlockPlan:
    n = grid[0] * grid[1] * grid[2]
    site = Site(role="self", name="test", layer=0, layers=1, grid=grid, visual=Span(0, n), ordered=True)
    return Neighborhood(window=(3, 5, 5), tile=tile).static_plan(Layout.of(site)).plan


@pytest.mark.parametrize("tile, width", [((2, 4, 4), 16), ((4, 8, 3), 16), ((4, 8, 4), 16), ((1, 8, 12), 32)])
def test_a_mask_as_a_product_says_what_the_box_says(tile: tuple[int, int, int], width: int):
    plan = windows(tile)
    assert plan.box is not None and cell_width(plan, 128) == width
    form = cells(plan, 128)
    axes, offsets = form.dims.long()
    low, high = form.low[axes].mT - offsets, form.high[axes].mT - offsets
    for c in range(plan.n_kv_blocks):
        start, length = int(plan.kv_start[0, 0, c]), int(plan.kv_len[0, 0, c])
        hidden = 1.0 - ((form.origin[c] >= low) & (form.origin[c] < high)).float()
        seen = hidden @ form.hot.float().mT == 0
        coord = plan.box.coord[:, None, start : start + length]
        inside = ((plan.box.low[..., None] <= coord) & (coord < plan.box.high[..., None])).all(0)
        assert torch.equal(seen[:, :length], inside) and not seen[:, length:].any()


def test_tiles_that_differ_are_no_product():
    plan = windows((3, 4, 4))
    assert plan.box is not None and plan.box.cell is None and cell_width(plan, 128) == 0 and hopper_keys(plan) == 64


def test_a_cell_that_does_not_describe_the_keys_is_refused():
    plan = windows((2, 4, 4))
    assert plan.box is not None and plan.box.cell is not None
    wrong = dataclasses.replace(plan.box, cell=tuple(axis[::-1] for axis in plan.box.cell))
    with pytest.raises(PlanError, match=r"box\.cell"):
        dataclasses.replace(plan, box=wrong, trusted=False)
    assert plan.with_kv_len(plan.kv_len[0, 0]).box.cell is None


def test_row_facts_are_those_of_the_plan_longest_list_first():
    plan = dataclasses.replace(
        plan_of(),
        spread=None,
        count=torch.tensor([1, 5, 2, 4, 3]),
        n_full=torch.tensor([1, 5, 2, 4, 3]),
        dense_rows=((2, 3),),
    )
    facts = row_facts(plan)[0, 0]
    assert facts[:, 0].tolist() == [1, 2, 3, 4, 0]
    for r, start, length, full, every, dense, *words in facts.tolist():
        assert (start, length) == (int(plan.q_start[0, 0, r]), int(plan.q_len[0, 0, r]))
        assert full == every == (5 if r == 2 else int(plan.count[0, 0, r])) and dense == (r == 2)
        assert words == [r * plan.index.shape[-1], 0]


def test_equal_lists_keep_programs_and_unequal_ones_start_one_an_item():
    assert programs_for(100, None, 132) == 100
    assert programs_for(3072, 0.0, 132) == 132
    assert programs_for(3072, 1.0, 132) == 3072 and programs_for(3072, None, 132) == 3072


VIEWS = {
    "heads first": lambda: torch.empty(2, 3, 10, 16),
    "tokens first": lambda: torch.empty(2, 10, 3, 16).transpose(1, 2),
    "one head of many": lambda: torch.empty(2, 10, 5, 16).transpose(1, 2)[:, 1:4],
    "fused projection": lambda: torch.empty(2, 10, 3, 3, 16)[:, :, 1].transpose(1, 2),
    "first tokens": lambda: torch.empty(2, 20, 3, 16).transpose(1, 2)[:, :, :10],
    "first tokens, heads first": lambda: torch.empty(2, 3, 20, 16)[:, :, 3:13],
    "one sample": lambda: torch.empty(7, 10, 3, 16).transpose(1, 2)[4:5],
    "one head": lambda: torch.empty(2, 1, 10, 16),
}


@pytest.mark.parametrize("name", VIEWS)
def test_rows_of_the_table_are_rows_of_the_tensor(name: str):
    x = VIEWS[name]()
    x.untyped_storage()
    table = row_table(x.shape, x.stride())
    assert table is not None
    rows, columns, row_b, row_h, col_h = table
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for n in range(x.shape[2]):
                row, column = b * row_b + h * row_h + n, h * col_h
                assert row < rows and column + x.shape[3] <= columns
                assert row * x.stride(2) + column == b * x.stride(0) + h * x.stride(1) + n * x.stride(2)


@pytest.mark.parametrize(
    "x",
    [torch.empty(2, 3, 16, 10).mT, torch.empty(2, 3, 10, 32)[..., ::2], torch.empty(10, 2, 3, 16).permute(1, 2, 0, 3)[:, :, ::3]],
    ids=["last stride", "strided", "ok"],
)  # fmt: skip
def test_tables_are_found_or_refused_never_wrong(x: Tensor):
    table = row_table(x.shape, x.stride())
    assert table is None or x.stride(3) == 1


def test_tiles_follow_the_length_of_blocks():
    assert fill(440, 128) == 440 / 512 and fill(64, 64) == 1
    assert hopper_keys(plan_of(n=512, m=512, length=256)) == 128
    assert hopper_keys(plan_of(n=512, m=512, length=64)) == 64


def test_a_cpu_is_told_why_hopper_is_skipped():
    assert "hopper skipped: it runs on cuda" in str(choose(torch.zeros(1, 1, 40, 16), plan_of()))


def test_a_graph_being_compiled_may_ask_where_keys_lie(monkeypatch):
    monkeypatch.setitem(needs.IMPLEMENTATIONS, "torch", dataclasses.replace(needs.IMPLEMENTATIONS["torch"], rows=True))
    plan = plan_of()
    call = lambda q, k, v: block_sparse_attention(q * 2, k, v, plan)  # noqa: E731
    q, k, v = (torch.randn(1, 40, 2, 16).transpose(1, 2) for _ in range(3))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


PROXIES = {"proxies", "variance", "heads", "block_bias", "init", "order"}


@pytest.mark.parametrize("features", [PROXIES, {"proxies"}, set()], ids=["variances", "proxies", "none"])
def test_the_kernel_is_given_the_proxies_of_the_plan_by_name(features: set[str], monkeypatch):
    given: dict[str, object] = {}

    def launch(kernel, programs, moving, fixed, switches, options, device):
        names = kernel.arg_names
        by_name = names[len(moving) + len(fixed) :]
        assert set(by_name) == set(switches)
        args = (*moving, *fixed, *[switches[name] for name in by_name])
        facts(kernel, args)  # what is kept under must be something for every argument
        given.update(zip(names, args, strict=True))

    monkeypatch.setattr(hopper_call, "launch", launch)
    monkeypatch.setattr(hopper_call, "_processors", lambda _: 132)
    case = make_case(Recipe(torch.float16, 72, frozenset(features)), 11, longest=400)
    hopper_call.hopper_attention(case.q, case.k, case.v, case.plan, 0.5, True, case.init)
    proxies = case.plan.proxies
    assert given["PROXIES"] == (proxies is not None) and given["VAR"] == ("variance" in features)
    tables = (None, None, None) if proxies is None else (proxies.k, proxies.v, proxies.k_var)
    for name, x in zip(("pk", "pv", "var"), tables, strict=True):
        table = given[f"{name}_desc"]
        if x is None:
            assert table == 1  # compiled in
            continue
        for b, h, c in ((0, 0, 0), (x.shape[0] - 1, 1, x.shape[2] - 1)):
            row, col = b * given[f"{name}_row_b"] + h * given[f"{name}_row_h"] + c, h * given[f"{name}_col_h"]
            rows = table.base.as_strided(table.shape, table.strides)
            assert torch.equal(rows[row, col : col + 72], x[b, h, c].half())
    if proxies is not None:
        listed = listed_words(case.plan)
        assert torch.equal(given["ProxyN"], proxies.n) and torch.equal(given["Listed"], listed)
        assert (given["C"], given["pooled"]) == (proxies.n.shape[-1], 1)
        assert (given["pn_b"], given["pn_h"], given["li_b"], given["li_h"]) == (*lead(proxies.n), *lead(listed))


@pytest.mark.slow
def test_shipped_variants_compile_without_spills():
    env = {
        **os.environ,
        "TRITON_INTERPRET": "0",
    }  # a process of its own: here the interpreter stands in for the compiler
    command = [sys.executable, "-m", "foveal.kernels.block_sparse.hopper_compiling"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 6
    assert any("proxies" in row["feature"] for row in found)
    for row in found:
        assert row["spill"] == 0, row
        assert row["shared"] <= 227 * 1024, row


@pytest.mark.parametrize(
    "change, cut",
    [
        ({}, True),
        ({"m": 2048}, False),
        ({"list_order": "priority"}, False),
        ({"key_bias": torch.zeros(1, 1, 2000)}, False),
    ],
    ids=["ends inside a block", "ends with a block", "in any order", "biased"],
)
def test_lists_are_walked_from_their_end_where_it_hides_the_only_short_block(change: dict, cut: bool):
    m = change.get("m", 2000)
    plan = dataclasses.replace(plan_of(n=2000, m=m, length=128), **{k: v for k, v in change.items() if k != "m"})
    facts = plan_arguments(plan, 128).switches
    assert facts["CUT"] == cut and facts["EVEN"] == (m == 2048)


def test_proxies_need_queries_that_lie_in_place():
    case = make_case(Recipe(torch.float16, 64, frozenset({"proxies"})), 0, "cpu", longest=300)
    need, plan = needs.IMPLEMENTATIONS["hopper"], case.plan
    q = torch.empty(case.q.shape, dtype=torch.float16)
    assert need.call_refusal(q, plan) is None
    for other in (q[..., :32], q[..., ::2].repeat_interleave(2, -1).mT.contiguous().mT):
        assert "with proxies" in str(need.call_refusal(other, plan))
    order = torch.arange(plan.n_queries, dtype=torch.int32)
    assert "plan order" in str(need.call_refusal(q, dataclasses.replace(plan, q_order=order)))
