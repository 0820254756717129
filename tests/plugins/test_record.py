"""The record: what ran, where, how long, how densely, and why it did not."""

import json

import numpy as np
import pytest
import torch
from fakes import Masked, Spy
from rich.console import Console
from tiny import hunyuan_inputs, hunyuan_transformer, run, wan_call, wan_inputs, wan_pipe, wan_transformer

from foveal.plugins.accelerate import accelerate
from foveal.plugins.clock import Laps, start_clock, stop_clock
from foveal.plugins.record import KEPT_PLANS, Record

GRAT_KNOBS = {"group": (1, 2, 2), "b": (1, 1, 0)}


@pytest.fixture(scope="module")
def handle():
    pipe = wan_pipe()
    handle = accelerate(pipe, "grat", dense_steps=1, **GRAT_KNOBS)
    wan_call(pipe, steps=3)
    return handle


def test_layers_by_steps(handle):
    arrays = handle.record.by_layer_step()
    assert {a.shape for a in arrays.values()} == {(2, 3)}
    assert (arrays["calls"] == 2).all() and (arrays["seconds"] > 0).all()
    sparse = handle.record.layers[0].facts.plan.density
    np.testing.assert_allclose(arrays["density"], [[1, sparse, sparse]] * 2)
    assert handle.record.density() == pytest.approx((1 + 2 * sparse) / 3)


def test_times_add_up(handle):
    record = handle.record
    assert record.attention_seconds() == pytest.approx(record.by_layer_step()["seconds"].sum())
    assert record.attention_seconds() < record.transformer_seconds()
    assert record.transformer_by_step().shape == (3,)
    assert record.transformer_by_step().sum() == pytest.approx(record.transformer_seconds())
    assert sum(row["share"] for row in record.table()) == pytest.approx(
        record.attention_seconds() / record.transformer_seconds()
    )


def test_dense_reasons_are_counted_by_name(handle):
    names = ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]
    assert handle.record.ran_dense_why() == [{"reason": "dense step", "count": 4, "layers": names}]


def test_table_names_method_kernel_and_plan(handle):
    row = handle.record.table()[1]
    assert row["name"] == "transformer.blocks.1.attn1" and row["role"] == "self"
    assert row["method"].startswith("grat") and row["implementation"] == "torch"
    assert row["plan"].startswith("grat-B") and (row["calls"], row["dense_calls"]) == (6, 2)
    assert handle.record.implementations() == ["torch"]


def test_summary_prints_as_text_and_through_rich(handle):
    text = str(handle.summary())
    for part in (
        "2 of 2 layers",
        "transformer.blocks.0.attn1",
        "torch",
        "plan: grat-B",
        "dense, dense step: 4 calls",
        "attention took",
    ):
        assert part in text
    assert text.count("dense step") == text.count("dense_steps=1") * 0 + 1
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(handle.summary())
    assert "transformer.blocks.1.attn1" in console.export_text()


def test_to_dict_is_json(handle):
    data = json.loads(json.dumps(handle.record.to_dict(), allow_nan=False))
    assert data["steps"] == 3 and len(data["layers"]) == 2
    assert data["by_layer_step"]["calls"] == [[2, 2, 2]] * 2


def test_reset_forgets_what_ran_and_keeps_the_layers():
    model, inputs = wan_transformer(), wan_inputs()
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    run(model, inputs)
    handle.reset()
    record = handle.record
    assert record.steps == 0 and record.attention_seconds() == record.transformer_seconds() == 0
    assert np.isnan(record.density()) and len(record.table()) == 2
    assert json.dumps(record.to_dict(), allow_nan=False)


def test_timing_can_be_left_out():
    model, inputs = wan_transformer(), wan_inputs()
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    handle.record.timing = False
    run(model, inputs)
    assert handle.record.attention_seconds() == 0 == handle.record.transformer_seconds()
    assert handle.record.layers[0].calls == 1 and handle.record.density() < 1


def test_methods_without_a_plan_have_no_density():
    model, inputs = wan_transformer(), wan_inputs()
    handle = accelerate(model, Masked())
    run(model, inputs)
    assert handle.record.table()[0]["density"] is None and handle.record.layers[0].dense_calls == 0


def test_capture_keeps_chosen_calls_only():
    model, inputs = wan_transformer(), wan_inputs(2)
    handle = accelerate(model, Spy())
    run(model, inputs)
    assert handle.record.captured == []
    handle.record.capture = [(1, 2)]
    for _ in range(3):
        run(model, inputs)
    (kept,) = handle.record.captured
    assert (kept.site.layer, kept.site.step) == (1, 2)
    assert kept.q.shape == kept.k.shape == kept.v.shape == (2, 2, 72, 16)


def test_prompt_lengths_do_not_make_new_plans():
    model = hunyuan_transformer()
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    for valid in (3, 5, 8):
        run(model, hunyuan_inputs(valid=(valid,)))
    assert len({id(row.facts) for row in handle.record.layers}) == 1


def test_kept_plans_are_bounded():
    model = wan_transformer()
    handle = accelerate(model, "grat", group=(1, 1, 2))
    for width in range(2, KEPT_PLANS + 6):
        run(model, wan_inputs(grid=(1, 2, width)))
    assert len(handle.record._facts) == KEPT_PLANS
    assert handle.record.layers[0].calls == KEPT_PLANS + 4 and handle.record.density() > 0


def test_unread_event_pairs_do_not_pile_up():
    class Event:
        def query(self):
            return True

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 2.0

    laps = Laps()
    for _ in range(1000):
        laps.add((Event(), Event()))
    assert len(laps.pending) < 64
    assert laps.seconds() == pytest.approx(2.0)


def test_clock_measures_the_host_on_a_cpu():
    cpu = torch.device("cpu")
    assert 0 <= stop_clock(start_clock(cpu)) < 1
    assert stop_clock(None) is None
    assert Record().steps == 0
