"""Laws of studies on the emoji model: its own reader, metrics that do not apply, sizes outside the trained ones."""

from pathlib import Path

import pytest
from tiny_emoji import PROMPTS, make_model
from tiny_world import config

from foveal.pipelines.config import build, load
from foveal.pipelines.emoji.scenes import held_out
from foveal.pipelines.emoji.vocabulary import attributes_of, parse
from foveal.pipelines.engine import execute
from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics import choose, metric

GRAT = {"name": "grat", "label": "GRAT-X", "knobs": {"group": [1, 8, 8], "pattern": "X"}}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("diffusers")
    return make_model(tmp_path_factory.mktemp("emoji"))


def run(folder, output, **changes):
    few = {"rounds": 0, "operator_rounds": 0, "step_samples": 1, "noise_floor_samples": 0, "seeds": [0]}
    plain = config(folder, output, **{"prompts": PROMPTS, "methods": [GRAT], **few, **changes})
    return execute(build(plain), verb="compare").document["studies"][0]


@pytest.mark.usefixtures("one_thread")
def test_an_image_is_read_and_has_no_motion(tiny, tmp_path):
    names = ["psnr", "step_rel_l1", "emoji_psnr", "acc_all", "acc_relation", "tdiff_psnr", "vbench.temporal_flickering"]
    study = run(tiny, tmp_path / "run", metrics=names)
    assert study["model"]["kind"] == "emoji" and study["model"]["tokens"] == 256
    found = {entry["id"]: entry for entry in study["methods"][1]["metrics"]}
    assert set(found) == set(names[:5])
    assert found["emoji_psnr"]["n"] == 2 and found["acc_relation"]["n"] == 1  # one prompt names two pictures
    assert found["psnr"]["value"] < 100
    reasons = {entry["id"]: entry["reason"] for entry in study["skipped"]}
    assert all("a single frame has no motion" in reasons[name] for name in names[5:])
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.usefixtures("one_thread")
def test_a_size_outside_the_trained_ones_says_so(tiny, tmp_path):
    study = run(tiny, tmp_path / "run", metrics=["psnr"], height=192, width=192, prompts=PROMPTS[:1])
    assert study["model"]["tokens"] == 48 * 48 and "192 px is outside its training sizes" in study["model"]["note"]
    assert "192 px is outside its training sizes" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frames": 4}, "makes single square images"),
        ({"height": 64, "width": 128}, "makes single square images"),
        ({"height": 100, "width": 100}, "use a multiple of 64"),
        ({"prompts": ["a large foxx on a mint background"]}, "nearest: 'fox'"),
        ({"metrics": ["world_psnr"]}, "reads only videos of the shipped procedural world"),
    ],
    ids=["frames", "square", "size", "prompt", "metric"],
)
def test_what_does_not_fit_is_refused_before_anything_runs(tiny, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        run(tiny, tmp_path / "run", **{"metrics": ["psnr"], **changes})


def test_each_model_is_read_by_its_own_reader():
    (own,), _ = choose(["acc_all"], world_model=False, emoji_model=True)
    (other,), _ = choose(["acc_all"], world_model=True)
    assert "emoji" in own.inputs and "world" in other.inputs
    chosen, skipped = choose(["emoji_psnr", "psnr"], world_model=True)
    assert [m.id for m in chosen] == ["psnr"] and "emoji model" in skipped[0]["reason"]
    assert metric("emoji_psnr").higher_is_better


@pytest.mark.parametrize("name", ["compare_emoji_flux", "emoji_flux_grat"])
def test_configs_ask_for_seen_combinations(name):
    for study in load(CONFIGS / f"{name}.yaml").studies:
        assert study.model == "emoji-flux" and not held_out(attributes_of([parse(p) for p in study.prompts])).any()
