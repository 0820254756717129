"""Runs on checkpoints of one's own: whole tiny diffusers pipelines, saved to a folder and given as `model`."""

import sys
from pathlib import Path

import pytest
from tiny_world import config

from foveal.pipelines.config import build
from foveal.pipelines.engine import execute
from foveal.pipelines.errors import UserError
from foveal.pipelines.generator import diffusers_source, load_generator

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"wan": {"frames": 9, "height": 48, "width": 64}, "flux": {"height": 32, "width": 48}}
PROMPTS = ["a cat riding a wave", "a dog"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the folder of a tiny pipeline."""
    import tiny

    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoints") / name
            tiny.PIPES[name][0]().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_local_checkpoint_runs_with_fidelity_and_teacher_forced_errors(saved, tmp_path, name):
    method = {"name": "grat", "label": "GRAT", "knobs": {"group": [1, 2, 2], "b": [1, 1, 0]}}
    data = config(
        saved(name), tmp_path / "r", prompts=PROMPTS, seeds=[0], methods=[method], metrics=["psnr", "latent_rel_l2", "step_rel_l1"],
        sampler={"steps": 2, "guidance": 3.0}, **SIZES[name],
    )  # fmt: skip
    study = execute(build(data)).document["studies"][0]
    dense, grat = study["methods"]
    assert not study["model"]["toy"] and study["model"]["grid"] and study["model"]["sha256"]
    assert 0 < grat["density"]["mean"] < 1 and dense["density"]["mean"] == 1
    found = {entry["id"]: entry["value"] for entry in grat["metrics"]}
    assert found["psnr"] < 100 and found["latent_rel_l2"] > 0 and found["step_rel_l1"] > 0


def test_a_batch_of_two_equals_two_batches_of_one(saved):
    study = build(
        config(saved("wan"), "r", prompts=PROMPTS, sampler={"steps": 1, "guidance": 1.0}, **SIZES["wan"])
    ).studies[0]
    generator = load_generator(study)
    both = generator.sample(PROMPTS, [3, 4]).frames
    for i, prompt in enumerate(PROMPTS):
        assert (generator.sample([prompt], [3 + i]).frames[0] - both[i]).abs().max() < 1e-3


def test_world_metrics_on_other_models_are_an_error_or_skipped(saved, tmp_path):
    data = config(
        saved("flux"), tmp_path / "r", prompts=PROMPTS[:1], seeds=[0], metrics=["acc_all", "psnr"], rounds=0, operator_rounds=0,
        noise_floor_samples=0, sampler={"steps": 1}, **SIZES["flux"],
    )  # fmt: skip
    data["methods"] = [{"name": "grat", "knobs": {"group": [1, 2, 2]}}]
    with pytest.raises(UserError, match="on_missing: skip"):
        execute(build(data))
    study = execute(build({**data, "on_missing": "skip", "output": str(tmp_path / "s")})).document["studies"][0]
    assert {"id": "acc_all", "reason": "reads only videos of the shipped procedural world"} in study["skipped"]


@pytest.mark.parametrize("model", ["black-forest-labs/FLUX.1-dev", "owner/name"])
def test_owner_slash_name_is_a_hub(model):
    assert diffusers_source(model, ["world-nano"]) == model


@pytest.mark.parametrize("model", ["/no/where/at/all", "./x", "~/x", "a/b/c"])
def test_a_path_that_is_not_there_is_named(model):
    with pytest.raises(UserError, match="there is no folder"):
        diffusers_source(model, ["world-nano"])
