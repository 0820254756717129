"""The harness of the composition matrix catches what it is there for: changed bits, silent dense runs, models not restored."""

import cells
import pytest
import test_matrix
from cells import observe

from foveal.plugins.diffusers_host.composition import ORDERS, Verdict
from foveal.plugins.handle import Handle

HOST, CONDITION = "ltx", "lora"
pytestmark = pytest.mark.filterwarnings("ignore")
both_orders = pytest.mark.parametrize("order", ORDERS)


@both_orders
def test_changed_bits_are_caught(monkeypatch, order):
    def sparse(target, method, **knobs):
        return accelerate(target, "grat", group=(1, 2, 2), b=(1, 1, 0))

    accelerate = cells.accelerate
    monkeypatch.setattr(cells, "accelerate", sparse)
    with pytest.raises(AssertionError, match="differs by"):
        observe(HOST, CONDITION, order, "dense")


@both_orders
@pytest.mark.parametrize("knobs", [{"dense_steps": 1}, {"dense_layers": (0,)}], ids=["a step", "a layer"])
def test_a_silent_dense_run_is_caught(monkeypatch, order, knobs):
    monkeypatch.setitem(cells.METHODS, "grat", {**cells.METHODS["grat"], **knobs})
    with pytest.raises(AssertionError, match="dense"):
        observe(HOST, CONDITION, order, "grat")


@both_orders
def test_a_model_that_is_not_restored_is_caught(monkeypatch, order):
    monkeypatch.setattr(Handle, "remove", lambda self: None)
    with pytest.raises(AssertionError, match="differs by"):
        observe(HOST, CONDITION, order, "neighborhood")


@both_orders
def test_an_unforeseen_refusal_is_caught(monkeypatch, order):
    def refuse(target, method, **knobs):
        raise cells.AccelerateError("no.")

    monkeypatch.setattr(cells, "accelerate", refuse)
    with pytest.raises(AssertionError, match=r"seen: refuses: no\."):
        test_matrix.check(HOST, CONDITION, order, "dense")


@both_orders
def test_a_refusal_in_other_words_is_caught(monkeypatch, order):
    monkeypatch.setattr(test_matrix, "verdict", lambda *cell: Verdict("refuses", "because it is Tuesday."))
    with pytest.raises(AssertionError, match="Tuesday"):
        test_matrix.check("wan", "context-parallel", order, "dense")


def test_processors_that_vanish_without_a_warning_are_caught(monkeypatch):
    monkeypatch.setattr(Handle, "is_active", lambda self: False)
    with pytest.raises(AssertionError, match="the run warns"):
        observe(HOST, CONDITION, "after", "grat")
