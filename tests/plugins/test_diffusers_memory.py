"""Peak memory of an accelerated model: at most one copy of q, k and v of one layer above the same model dense.

Accounting: bytes of living tensors that PyTorch operators make during two forwards (the first one makes plans), at their highest,
weights and inputs not counted; to the accelerated model's figure the bytes of its plans are added, which outlive the forwards.
Models are narrow and sequences long, which is the hard case: masks and indices weigh most where tokens are short.
"""

import sys
from pathlib import Path

import pytest
import torch
from fakes import Masked
from test_hunyuan15 import inputs_of, model_of
from tiny import (
    flux_inputs,
    flux_transformer,
    hunyuan_inputs,
    hunyuan_transformer,
    run,
    wan_inputs,
    wan_transformer,
)

from foveal.kernels.block_sparse import block_sparse_attention
from foveal.plugins.accelerate import accelerate
from foveal.plugins.layout import Layout
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import Span

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import peak_memory
from peak_memory import LiveBytes, plan_bytes

GRID, TOKENS, TEXT, WIDTH = (4, 32, 40), 5120, 64, 32
MODELS = {
    "wan": (lambda: wan_transformer(num_layers=1), lambda: wan_inputs(1, GRID)),
    "flux": (
        lambda: flux_transformer(num_layers=1, num_single_layers=1),
        lambda: flux_inputs(1, (1, 64, 80), text=TEXT),
    ),
    "hunyuan": (
        lambda: hunyuan_transformer(num_layers=1, num_single_layers=1),
        lambda: hunyuan_inputs(1, GRID, text=TEXT, valid=(40,)),
    ),
    "hunyuan15": (lambda: model_of(num_layers=1), lambda: inputs_of([(4, 2)], grid=GRID)),
}
METHODS = {
    "grat": GRAT(),
    "grat-crosses": GRAT(pattern="X"),
    "grat-large-groups": GRAT(group=(4, 8, 8)),
    "neighborhood": Neighborhood(window=(3, 9, 9)),
}
COPY = 3 * TOKENS * WIDTH * 4  # bytes of q, k and v of one layer, text not counted


def fitted(method, name):
    """The method for a model's grid: Flux has one frame."""
    if name != "flux":
        return method
    return {"grat-large-groups": GRAT(group=(1, 16, 16)), "neighborhood": Neighborhood(window=(1, 17, 17))}.get(
        next(n for n, m in METHODS.items() if m is method), method
    )


def peak(model, inputs):
    with LiveBytes() as watch:
        run(model, inputs)
        run(model, inputs)
    return watch.peak


@pytest.fixture(scope="module")
def dense():
    """Peak of every model with dense attention; HunyuanVideo 1.5 without its mask over all pairs."""
    peaks = {}
    for name, (make, inputs) in MODELS.items():
        model = make()
        if name == "hunyuan15":
            accelerate(model, "dense")
        peaks[name] = peak(model, inputs())
    return peaks


@pytest.mark.parametrize("hook", [True, False], ids=["ordered-once", "ordered-per-call"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_accelerated_model_takes_at_most_one_copy_more(name, method, hook, dense):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    handle = accelerate(model, fitted(method, name))
    handle.order_hook = hook
    took = peak(model, inputs)
    assert handle.record.density() < 1 and not handle.record.ran_dense_why()
    extra = (took - dense[name] + plan_bytes(handle)) / COPY
    assert extra <= 1, f"{extra:.2f} copies of q, k and v more than dense"


def test_hunyuan15_takes_a_fraction_of_the_original(dense):
    make, inputs = MODELS["hunyuan15"]
    assert dense["hunyuan15"] < peak(make(), inputs()) / 5


def test_a_method_that_masks_all_pairs_breaks_the_law():
    model, inputs = MODELS["wan"][0](), wan_inputs(1, (4, 16, 20))
    plain = peak(model, inputs)
    accelerate(model, Masked())
    assert peak(model, inputs) - plain > 3 * COPY / 4, "three copies of this shorter sequence"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("text", [0, TEXT], ids=["alone", "with-text"])
def test_attention_call_in_order_takes_at_most_one_copy(method, text):
    layout = Layout(GRID, Span(0, TOKENS), Span(TOKENS, TOKENS + text) if text else None, ordered=True)
    q, k, v = (torch.randn(1, layout.tokens, 2, WIDTH // 2).transpose(1, 2) for _ in range(3))
    plan = method.static_plan(layout).with_valid_text(None)
    with LiveBytes() as watch:
        out = block_sparse_attention(q, k, v, plan)
    assert watch.peak - out.nbytes <= COPY


# ---- the tracker and the script
def test_living_bytes_are_counted_when_they_come_and_go():
    given = torch.zeros(1000)
    with LiveBytes() as watch:
        one = given + 1
        view = one[:10]
        two = one * 2
        assert (watch.live, watch.peak) == (8000, 8000)
        del one
        assert watch.live == 8000, "a view keeps its storage"
        del view
        assert watch.live == 4000
        given.add_(two)
        assert (watch.live, watch.peak) == (4000, 8000)


def test_the_benchmark_measures_every_method(tmp_path):
    arguments = ["--device", "cpu", "--tiny", "--rounds", "1", "--layers", "1", "--out", str(tmp_path / "rows.json")]
    rows = peak_memory.main([*arguments, "--cases", "wan-1.3b-480p", "hunyuan-1.5-720p"])
    assert (tmp_path / "rows.json").exists()
    assert [row["method"] for row in rows] == [None, "dense", "grat", "neighborhood"] * 2
    assert all(row["extra_copies"] <= 1 and row["ms"] > 0 for row in rows)
    sparse = [row for row in rows if row["method"] in ("grat", "neighborhood")]
    assert all(row["impl"] == "torch" and row["density"] < 0.5 for row in sparse)
