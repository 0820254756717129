"""`bench layers` on real diffusers blocks of tiny width: what skips nothing changes nothing, figures follow from each other."""

import json
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from foveal.pipelines.bench import contender, layers, models
from foveal.pipelines.bench.__main__ import run
from foveal.pipelines.bench.models import Rival
from foveal.pipelines.bench.rounds import How
from foveal.pipelines.bench.rows import FIELDS

CPU = torch.device("cpu")
WAN, FLUX, HUNYUAN = models.TINY
ONCE = How.on(CPU, rounds=1)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = run("layers", out=tmp_path_factory.mktemp("bench") / "l.json", device="cpu", rounds=3, tiny=True)
    return json.loads(path.read_text())


def rows_of(record, case):
    return {r["impl"]: r for r in record["rows"] if r["case"] == case.name}


def test_the_record_has_the_schema(record):
    assert record["bench"] == "layers" and "diffusers" in record["versions"] and record["rounds"] == 3
    assert all(set(FIELDS) <= set(r) and r.get("failed") is None for r in record["rows"])
    assert {r["peak_bytes"] for r in record["rows"]} == {None}  # the allocator of a CPU does not say


@pytest.mark.parametrize("case", models.TINY, ids=lambda case: case.name)
def test_every_case_has_its_contenders(record, case):
    expected = {"dense", "host", "full density", "grat", "grat, own norms", "neighborhood"}
    expected |= {"dense, compiled", "grat, compiled"}
    assert set(rows_of(record, case)) == expected | ({"dense, masked"} if case is HUNYUAN else set())
    methods = {n: r["method"] for n, r in rows_of(record, case).items() if r["method"]}
    assert set(methods.values()) == {"grat", "neighborhood"} and all(n.startswith(m) for n, m in methods.items())


@pytest.mark.parametrize("case", models.TINY, ids=lambda case: case.name)
def test_compiled_blocks_are_compared_with_compiled_blocks(record, case):
    rows = rows_of(record, case)
    r, base = rows["grat, compiled"], rows["dense, compiled"]
    assert r["baseline"] == "dense, compiled" and r["speedup"] == pytest.approx(base["ms"] / r["ms"])
    assert r["density"] == rows["grat"]["density"]  # inside a graph the method runs as outside
    assert rows["grat"]["baseline"] == "dense"


@pytest.mark.parametrize("case", models.TINY, ids=lambda case: case.name)
def test_what_skips_nothing_changes_nothing(record, case):
    rows = rows_of(record, case)
    assert rows["host"]["difference"] == 0.0  # the model's own attention, to the bit
    assert rows["full density"]["difference"] < 1e-5 and rows["full density"]["density"] == 1.0
    for name in layers.NOTHING_SKIPPED:
        low, high = rows[name]["overhead_quartiles"]
        assert low <= rows[name]["overhead"] <= high


@pytest.mark.parametrize("case", models.TINY, ids=lambda case: case.name)
def test_bounds_are_amdahls(record, case):
    rows = rows_of(record, case)
    block, attention = rows["dense"]["ms"], rows["dense"]["attention_ms"]
    assert rows["dense"]["attention_share"] == pytest.approx(attention / block)
    for name in ("grat", "neighborhood"):
        r = rows[name]
        assert r["bound"] == pytest.approx(block / (block - attention)) and 0 < r["density"] <= 0.5
        assert r["bound_at_density"] == pytest.approx(block / (block - attention + r["density"] * attention))
        assert r["kernel"] == "torch" and r["setting"].startswith(name)
        assert r["speedup"] == pytest.approx(block / r["ms"])
        assert r["eff"] == pytest.approx(block * r["density"] / r["ms"])
        assert r["model_speedup"] == pytest.approx(rows["dense"]["model_ms"] / r["model_ms"])


def test_without_its_compiled_baseline_a_compiled_row_is_not_measured(monkeypatch):
    compiled = []

    def fails_once(forward, **_):
        compiled.append(forward)
        if len(compiled) == 1:
            raise RuntimeError("no compiler")
        return forward

    monkeypatch.setattr(torch, "compile", fails_once)
    rows = {r["impl"]: r for r in layers.measure_case(WAN, ONCE)}
    assert "no compiler" in rows["dense, compiled"]["failed"] and rows["grat"]["ms"] > 0
    assert "because dense, compiled failed" in rows["grat, compiled"]["failed"]


# ---- a call taken apart
class Told:
    """A stopwatch that was told its times."""

    def __init__(self, times):
        self.told = times

    def times(self):
        return self.told


def test_a_deep_model_is_its_blocks_by_kind_and_what_is_paid_once():
    model, _ = models.made(FLUX, CPU, torch.float32)
    found = contender.Contender(model, layers.ALONE, False, CPU, depths=(2, 3))
    found.blocks, found.whole = Told([10.0, 20.0, 11.0, 21.0]), Told([37.0, 39.0])  # two calls of two blocks
    assert found.rest_ms() == [7.0, 7.0]
    assert found.model_ms() == [2 * 10 + 3 * 20 + 7, 2 * 11 + 3 * 21 + 7]
    assert found.blocks_ms() == [pytest.approx(80 / 5), pytest.approx(85 / 5)]


def test_a_call_is_timed_by_block_and_as_a_whole():
    model, inputs = models.made(WAN, CPU, torch.float32)
    found = contender.Contender(model, Rival("grat", {"group": WAN.tile, "density": 0.5}), False, CPU, WAN.depths)
    found(inputs)
    assert len(found.blocks.times()) == 2 and len(found.whole.times()) == 1 and found.rest_ms()[0] > 0
    assert found.weights == [1.5, 1.5]  # three layers of one kind, two blocks to time them with
    found.forget()
    assert found.blocks.times() == [] and found.host == []


def test_contenders_share_weights_and_leave_the_model_as_it_was():
    model, inputs = models.made(FLUX, CPU, torch.float32)
    with torch.inference_mode():
        before = model(**inputs, return_dict=False)[0]
    sparse = contender.Contender(
        model, Rival("neighborhood", {"tile": FLUX.tile, "density": 0.5}), False, CPU, FLUX.depths
    )
    assert not torch.equal(sparse(inputs), before)
    own, theirs = dict(model.named_parameters()), dict(sparse.model.named_parameters())
    assert all(theirs[name] is own[name] for name in own)
    with torch.inference_mode():
        assert torch.equal(model(**inputs, return_dict=False)[0], before)


class Masks(TorchFunctionMode):
    """Which attention calls had a mask."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((kwargs or {}).get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


def test_a_mask_that_hides_nothing_is_taken_from_the_baseline_and_from_it_alone():
    field = layers.Field(HUNYUAN, CPU, torch.float32)
    masked, outputs = {}, {}
    for name in ("dense", "dense, masked"):
        with Masks() as masks:
            outputs[name] = field.call(name)
        masked[name] = sum(masks.seen)
    assert masked["dense, masked"] - masked["dense"] == 2  # the blocks; what refines the text keeps its mask
    torch.testing.assert_close(outputs["dense"], outputs["dense, masked"])


def test_tokens_are_put_in_order_once_per_call_outside_the_blocks(monkeypatch):
    model, inputs = models.made(WAN, CPU, torch.float32)
    found = contender.Contender(model, Rival("grat", {"group": WAN.tile, "density": 0.5}), False, CPU, WAN.depths)
    found(inputs)
    plans = [layer.facts.plan for layer in found.handle.record.layers if layer.facts]
    assert len(plans) == 2 and all(plan.ordered for plan in plans)


def test_models_keep_in_fp32_what_a_loaded_one_would():
    model, inputs = models.made(WAN, CPU, torch.bfloat16)
    kept = model.condition_embedder.time_embedder.linear_1.weight.dtype
    assert kept == torch.float32 and model.blocks[0].ffn.net[0].proj.weight.dtype == torch.bfloat16
    assert inputs["timestep"].dtype == torch.int64 and inputs["hidden_states"].dtype == torch.bfloat16


# ---- failures
def test_a_contender_that_fails_is_a_row_and_the_others_are_measured():
    rows = {r["impl"]: r for r in layers.measure_case(replace(WAN, density=1e-6), ONCE)}
    assert rows["dense"]["ms"] > 0 and rows["host"]["ms"] > 0
    assert "density" in rows["grat"]["failed"] and rows["grat"]["ms"] is None
    assert "failed: " in layers.line(rows["grat"])


def test_a_contender_that_fails_in_the_middle_is_a_row(monkeypatch):
    calls = []

    def once_too_often(self, inputs, call=contender.Contender.__call__):
        if self.handle is not None and self.handle.method.name == "grat":
            calls.append(0)
            if len(calls) > 3:
                raise RuntimeError("out of memory")
        return call(self, inputs)

    monkeypatch.setattr(contender.Contender, "__call__", once_too_often)
    rows = {r["impl"]: r for r in layers.measure_case(WAN, How.on(CPU, rounds=3))}
    assert rows["grat"]["failed"] == "RuntimeError: out of memory"
    assert rows["neighborhood"]["rounds"] == rows["dense"]["rounds"] == 3


def test_where_dense_fails_nothing_is_compared(monkeypatch):
    def too_large(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layers, "made", too_large)
    rows = layers.measure_case(WAN, ONCE)
    assert [r["impl"] for r in rows] == ["dense", *WAN.rivals]
    assert all(r["failed"] == "RuntimeError: out of memory" and r["speedup"] is None for r in rows)


# ---- cases
def test_an_unknown_case_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no case flux-9; choose from wan-1.3b-480p, wan-14b-480p"):
        list(layers.measure(CPU, 0.1, cases=["flux-9"]))


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.name)
def test_the_methods_of_a_case_come_near_its_density_in_full_blocks(case):
    from foveal.plugins.layout import Layout

    joint = case.family != "wan"
    layout = Layout.joint(case.grid, case.text if joint else 0, case.family == "flux")
    for name in ("grat", "neighborhood"):
        kind, knobs = case.rivals[name][:2]
        plan = models.METHODS[kind](**knobs).static_plan(layout).plan
        assert 0.2 < plan.density <= case.density and torch.equal(plan.n_full, plan.count)
