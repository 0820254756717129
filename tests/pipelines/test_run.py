"""Laws of the run engine: the folder's contract, resuming, refusing, honesty of what is written."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny_world import GRAT, config, make_model

from foveal.pipelines import study as study_module
from foveal.pipelines.config import build
from foveal.pipelines.engine import execute
from foveal.pipelines.errors import Interrupted, UserError
from foveal.pipelines.run import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def finished(one_thread, model, tmp_path_factory):
    """A run that is only read."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    return execute(build(config(model, folder)))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# ---- the folder
def test_the_folder_holds_what_the_contract_says(finished):
    names = set(files(finished.folder))
    assert {"config.yaml", "result.json", "report.html", "plans/grat.safetensors"} <= names
    for method in ("dense", "grat"):
        for cell in ("0-0", "0-1", "1-0", "1-1"):
            assert {f"media/{method}/{cell}.safetensors", f"media/{method}/{cell}.webp"} <= names


def test_a_sample_is_eight_bit_video(finished):
    with safe_open(finished.folder / "media/grat/0-0.safetensors", "pt") as file:
        video = file.get_tensor("video")
    assert video.dtype == torch.uint8 and tuple(video.shape) == (4, 16, 16, 3)


def test_the_result_is_strict_json_with_every_part(finished):
    document = json.loads((finished.folder / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    study = document["studies"][0]
    assert document["schema"] == 1 and study["model"]["toy"] and "toy" in study["note"].lower()
    assert study["model"]["grid"] == [4, 4, 4] and study["design"]["seeds"] == [0, 1]
    dense, grat = study["methods"]
    assert (dense["name"], grat["name"]) == ("dense", "grat")
    assert grat["density"]["mean"] == pytest.approx(10 / 16) and grat["density"]["visited"] >= grat["density"]["mean"]
    assert len(grat["time_by_layer_step"]) == 2 and len(grat["time_by_layer_step"][0]) == 2
    for part in ("attention", "transformer", "end_to_end", "operator"):
        assert grat["speed"][part]["median_s"] > 0
    assert 0 < study["amdahl"]["attention_share"] < 1
    assert grat["speed"]["speedup"]["amdahl_bound"] == pytest.approx(study["amdahl"]["bound"])


def test_spans_nest(finished):
    for method in finished.document["studies"][0]["methods"]:
        speed = method["speed"]
        assert speed["attention"]["median_s"] <= speed["transformer"]["median_s"] <= speed["end_to_end"]["median_s"]


def test_metrics_have_intervals_per_sample_values_and_no_fidelity_of_dense_to_itself(finished):
    dense, grat = finished.document["studies"][0]["methods"]
    found = {entry["id"]: entry for entry in grat["metrics"]}
    assert set(found) == {"psnr", "ssim", "step_rel_l1", "world_psnr", "acc_all"}
    assert {entry["id"] for entry in dense["metrics"]} == {"world_psnr", "acc_all"}
    psnr = found["psnr"]
    assert len(psnr["per_sample"]) == 4 and psnr["ci95"][0] <= psnr["value"] <= psnr["ci95"][1]
    assert psnr["noise_floor"] > psnr["value"] and "mcnemar_p" in found["acc_all"]["difference"]
    assert sum(v is not None for v in found["step_rel_l1"]["per_sample"]) == 1


def test_the_command_and_config_repeat_the_run(finished, tmp_path):
    data = yaml.safe_load((finished.folder / "config.yaml").read_text())
    again = execute(
        build(
            {
                **data,
                "output": str(tmp_path / "again"),
                "rounds": 0,
                "operator_rounds": 0,
                "step_samples": 0,
                "noise_floor_samples": 0,
            }
        )
    )
    for method in ("dense", "grat"):
        with (
            safe_open(finished.folder / f"media/{method}/1-1.safetensors", "pt") as a,
            safe_open(again.folder / f"media/{method}/1-1.safetensors", "pt") as b,
        ):
            assert torch.equal(a.get_tensor("video"), b.get_tensor("video"))


def test_full_density_reaches_the_dense_video(model, tmp_path):
    whole = {"name": "grat", "label": "whole", "knobs": {"group": [1, 4, 4], "b": -1}}
    outcome = execute(
        build(config(model, tmp_path / "r", methods=[whole], rounds=0, operator_rounds=0, metrics=["psnr"]))
    )
    assert outcome.document["studies"][0]["methods"][1]["metrics"][0]["value"] == 100


# ---- resuming
class Stop:
    """Interrupts after some network steps."""

    def __init__(self, after):
        self.left = after

    def __call__(self, original):
        def save(store, *args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return original(store, *args, **kwargs)

        return save


def test_an_interrupted_run_keeps_its_samples_and_says_how_to_go_on(model, tmp_path, monkeypatch):
    data = config(model, tmp_path / "r", rounds=0, operator_rounds=0, step_samples=0, noise_floor_samples=0)
    store = study_module.Store
    monkeypatch.setattr(store, "save", Stop(3)(store.save))
    with pytest.raises(Interrupted, match=r"3 finished samples are kept in .*go on with: foveal run"):
        execute(build(data))
    monkeypatch.undo()
    before = {k: v for k, v in files(tmp_path / "r").items() if k.startswith("media")}
    assert len(before) == 6
    execute(build(data))
    after = files(tmp_path / "r")
    assert {k: after[k] for k in before} == before and len([k for k in after if k.endswith(".webp")]) == 8


def test_a_finished_run_generates_nothing_again(model, tmp_path, monkeypatch):
    data = config(model, tmp_path / "r")
    first = execute(build(data)).document["studies"]
    monkeypatch.setattr("foveal.pipelines.generator.Generator.sample", lambda *a, **k: pytest.fail("sampled again"))
    assert execute(build(data)).document["studies"] == first


def test_a_folder_of_another_config_is_refused_and_left_alone(finished, model):
    before = files(finished.folder)
    with pytest.raises(UserError, match="they differ in seeds"):
        execute(build(config(model, finished.folder, seeds=[7])))
    assert files(finished.folder) == before


def test_a_folder_with_other_files_is_refused(model, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"):
        execute(build(config(model, tmp_path)))
    assert files(tmp_path).keys() == {"precious.txt"}


def test_samples_of_other_weights_are_refused(model, tmp_path):
    data = config(model, tmp_path / "r", rounds=0, operator_rounds=0, metrics=["world_psnr"], noise_floor_samples=0)
    execute(build(data))
    torch.manual_seed(5)
    for path in Path(model).glob("model.safetensors"):
        original, recorded = path.read_bytes(), (path.parent / "config.json").read_text()
    try:
        from foveal.pipelines.world.export import export
        from foveal.pipelines.world.models import MODELS, build_transformer
        from foveal.pipelines.world.text import TextTable

        weights = {
            f"model.{k}": v for k, v in build_transformer(MODELS["tiny"].transformer, "twin").state_dict().items()
        }
        export(Path(model), MODELS["tiny"], weights | {f"text.{k}": v for k, v in TextTable(64).state_dict().items()})
        with pytest.raises(UserError, match="other weights"):
            execute(build(data))
    finally:
        make_model(Path(model).parent)
        assert (Path(model) / "model.safetensors").read_bytes() == original
        assert (Path(model) / "config.json").read_text() == recorded


# ---- refusing early
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"methods": [{"name": "gart"}]}, "did you mean 'grat'"),
        ({"methods": [{"name": "grat", "knobs": {"grup": 1}}]}, "did you mean 'group'"),
        ({"metrics": ["psrn"]}, "did you mean 'psnr'"),
        ({"model": "world-nan"}, "did you mean 'world-nano'"),
        ({"model": "./models/FLUX.1-dev"}, "there is no folder models/FLUX.1-dev"),
        ({"prompts": ["a cat"]}, "unknown word 'cat'"),
        ({"methods": [{"name": "dense"}, {"name": "dense"}]}, "more than once"),
        ({"height": 32, "width": 16}, "square"),
        ({"height": 18, "width": 18}, "patches"),
        ({"device": "cuda:9"}, "not available"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_input_that_cannot_run_is_one_sentence(model, tmp_path, change, text):
    with pytest.raises(UserError) as caught:
        execute(build(config(model, tmp_path / "r", **change)))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_pipeline_says_what_is_missing(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        execute(build(config(tmp_path / "empty", tmp_path / "r")))


@pytest.mark.parametrize("name", ["flux_grat", "wan_neighborhood"])
def test_example_configs_say_that_the_checkpoint_is_missing(name, tmp_path):
    with pytest.raises(
        UserError, match=r"there is no folder models/.*give the path of a checkpoint in diffusers format"
    ):
        run(name, [f"output={tmp_path / 'r'}", "device=cpu"])


def test_methods_with_one_label_get_different_folders(model, tmp_path):
    twice = [GRAT, {**GRAT, "knobs": {"group": [1, 4, 4], "b": 2}}]
    data = config(
        model, tmp_path / "r", methods=twice, rounds=0, operator_rounds=0, metrics=["world_psnr"], noise_floor_samples=0
    )
    assert [m["id"] for m in execute(build(data)).document["studies"][0]["methods"]] == ["grat", "grat-2"]


def test_one_prompt_has_no_intervals(model, tmp_path):
    data = config(
        model,
        tmp_path / "r",
        prompts=["a small red cross standing still on a gray plain background"],
        rounds=0,
        operator_rounds=0,
        step_samples=0,
    )
    entries = execute(build(data)).document["studies"][0]["methods"][1]["metrics"]
    assert entries and all(entry["ci95"] is None for entry in entries)
