"""Laws of the comparison: one contestant per density, dense always, paired."""

import pytest
from tiny_world import config

from foveal.pipelines.config import build
from foveal.pipelines.contestants import contestants, slug
from foveal.pipelines.engine import execute
from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics import metric

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = {"rounds": 0, "operator_rounds": 0, "step_samples": 0, "noise_floor_samples": 0}


def entrants(sweep=True, metrics=("psnr",), **changes):
    study = build(config("world-nano", "r", **{**QUIET, **changes})).studies[0]
    return contestants(study, [metric(name) for name in metrics], sweep=sweep)


SWEPT = [
    {"name": "grat", "label": "GRAT", "knobs": {"group": [1, 4, 4]}},
    {"name": "neighborhood", "knobs": {"window": [3, 4, 4]}},
]


def test_a_sweep_makes_one_contestant_per_density():
    found = entrants(methods=SWEPT[:1], densities=[0.25, 0.75])
    assert [c.label for c in found] == ["dense", "GRAT at 0.25", "GRAT at 0.75"]
    assert [c.method.density for c in found[1:]] == [0.25, 0.75]


def test_a_run_does_not_sweep():
    assert [c.id for c in entrants(sweep=False, methods=SWEPT[:1], densities=[0.25])] == ["dense", "grat"]


def test_dense_is_added_where_fidelity_needs_it_and_stands_first():
    assert entrants(sweep=False, methods=SWEPT)[0].is_dense
    assert not any(c.is_dense for c in entrants(sweep=False, methods=SWEPT, metrics=("world_psnr",)))
    explicit = [*SWEPT, {"name": "dense", "label": "the baseline"}]
    assert entrants(sweep=False, methods=explicit)[0].label == "the baseline"


def test_a_knob_that_fights_the_density_names_the_method():
    with pytest.raises(UserError, match=r"methods\[0\]: b"):
        entrants(methods=[{"name": "grat", "knobs": {"b": 1}}], densities=[0.5])


@pytest.mark.parametrize("text", ["GRAT-B b=1", "../x", "ü/ö", "a" * 200, "CON.", "3x16x16"])
def test_ids_are_plain_file_names(text):
    name = slug(text)
    assert name and "/" not in name and name not in (".", "..") and len(name) <= 60 and name.isascii()


def test_compare_runs_every_density_paired(tiny_model, tmp_path):
    data = config(
        tiny_model, tmp_path / "r", methods=SWEPT[:1], densities=[0.3, 0.7], metrics=["psnr", "world_psnr"], **QUIET
    )
    study = execute(build(data), verb="compare").document["studies"][0]
    assert [m["id"] for m in study["methods"]] == ["dense", "grat-at-0.3", "grat-at-0.7"]
    for method, budget in zip(study["methods"][1:], (0.3, 0.7), strict=True):
        assert 0 < method["density"]["mean"] <= budget + 1e-9
        assert all(len(entry["per_sample"]) == 4 for entry in method["metrics"])
    assert study["pareto"] == {"x": "density", "y": "psnr"}
