"""One cell of the composition matrix, run: what becomes of a host under a condition, seen from outside, and the laws it must keep.

``observe`` never asks the data what it should see. Laws of a cell that works, for every method: dense settings give what the condition
alone gives, sparse settings run sparse wherever they run at all, ``remove()`` gives the condition alone back.
"""

import copy
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from conditions import CONDITIONS, Case
from tiny_pipes import METHODS

from foveal.plugins.accelerate import AccelerateError, accelerate
from foveal.plugins.diffusers_host.composition import COMPILE_FIRST
from foveal.plugins.diffusers_host.roles import MOTION

EXACT = 0.0
NOISE = {
    "hunyuan1.5": 1e-5
}  # of the largest value: its attention is restated without padding, so sums run in another order


@dataclass(frozen=True)
class Seen:
    """What became of a cell: an outcome of the data, and the sentence that the user reads."""

    outcome: str
    reason: str = ""


@lru_cache(maxsize=64)
def alone(host, condition):
    """(result of the condition without foveal, None), or (None, the error)."""
    torch.compiler.reset()
    case = Case.of(host)
    try:
        CONDITIONS[condition](case)
        return case.run(), None
    except Exception as error:
        return None, error


def observe(host, condition, order, method):
    """Run one cell with one method and keep its laws; -> Seen."""
    torch.compiler.reset()
    case = Case.of(host)
    try:
        handle, got, warned = _together(case, condition, order, method)
    except Exception as error:
        return _refused(error, host, condition)
    if not handle.is_active():
        return _noticed(handle, warned)
    expected, error = alone(host, condition)
    assert error is None, f"{host} runs with foveal under {condition}, and not without: {error}"
    _laws(handle, case, method, got, expected, NOISE.get(host, EXACT))
    return Seen("works")


def _together(case, condition, order, method):
    """-> (handle, result, warnings of the run)"""
    turn_on, knobs = CONDITIONS[condition], METHODS[method]
    if order == "before":
        turn_on(case)
        handle = accelerate(case.pipe, method, **knobs)
    else:
        if condition == "gradient-checkpointing":
            _prepare(case)
        handle = accelerate(case.pipe, method, **knobs)
        turn_on(case)
    handle.reset()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        return handle, case.run(), [str(w.message) for w in warned]


def _prepare(case):
    """Arguments of a model call without foveal: those of the condition alone."""
    from conditions import model_calls

    _, args, kwargs = model_calls(case)[0]
    case.training = copy.deepcopy((args, kwargs))


def _refused(error, host, condition):
    """An error is a refusal of ours, or diffusers' own, which it also raises without us."""
    ours, text = isinstance(error, AccelerateError), " ".join(str(error).split())
    if ours or COMPILE_FIRST in text:
        return Seen("refuses", str(error) if ours else COMPILE_FIRST)
    _, plain = alone(host, condition)
    if plain is None:
        raise error
    return Seen("not applicable", text)


def _noticed(handle, warned):
    """Nothing of ours is left in the layers: the user must have been told."""
    summary = str(handle.summary())
    if handle.attachments and not any(attachment.bound for attachment in handle.attachments):
        assert "dense, " in summary
        return Seen("refuses", summary)
    assert any("hold another processor now" in sentence for sentence in warned), "the run warns"
    assert "hold another processor now" in summary
    return Seen("refuses", summary)


def _laws(handle, case, method, got, expected, noise):
    if method == "dense":
        assert_same(got, expected, noise)
    else:
        _ran_sparse(handle)
        assert bool(got.isfinite().all())
    handle.remove()
    torch.compiler.reset()
    assert_same(case.run(), expected, 0.0)


def assert_same(a, b, noise):
    """To the bit, or within ``noise`` of the largest value."""
    assert a.shape == b.shape
    error = float((a - b).abs().max())
    assert error <= noise * float(b.abs().max()), f"differs by {error:.2e}"


def _ran_sparse(handle):
    """Every bound layer that ran at all ran sparse, and nothing else is silently dense."""
    rows = [row for row in handle.record.layers if row.left_alone is None]
    ran = [row for row in rows if row.calls]
    assert ran, "no accelerated layer ran"
    assert all(row.dense_calls == 0 and row.mean("density") < 1 for row in ran), str(handle.summary())
    for row in handle.record.layers:
        assert row.left_alone is None or row.left_alone == MOTION or "weights of its own" in row.left_alone
