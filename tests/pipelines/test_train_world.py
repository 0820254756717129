"""Laws of training: the loss falls, a resumed run repeats an uninterrupted one, the export loads."""

import json
import subprocess
import sys

import pytest
import torch

from foveal.pipelines.shipped import load
from foveal.pipelines.train_world import main
from foveal.pipelines.world import checkpoint
from foveal.pipelines.world.evaluation import evaluate_real
from foveal.pipelines.world.examination import GROUPS, Paper, examine, examine_real, missed
from foveal.pipelines.world.flow import draw_sigmas
from foveal.pipelines.world.models import MODELS, build_transformer
from foveal.pipelines.world.text import TextTable
from foveal.pipelines.world.training import RECIPES, Shape, Trainer, learning_rate, start_from_nothing

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--model", "tiny", "--eval-n", "2", "--final-n", "4", "--evals", "1"]
TWO = ["--model", "tiny-two", "--eval-n", "2", "--final-n", "8", "--evals", "1"]


def trainer(kind: str = "twin", seed: int = 0, name: str = "tiny") -> Trainer:
    torch.manual_seed(seed)
    model = build_transformer(MODELS[name].transformer, kind)
    start_from_nothing(model)
    return Trainer(model, TextTable(64), RECIPES[name], torch.device("cpu"))


def steps(run: Trainer, n: int, total: int) -> list[float]:
    return [run.train_step(run.step / total).item() for _ in range(n)]


@pytest.mark.parametrize("kind", ["twin", "stock"])
def test_loss_falls_in_thirty_steps(kind):
    if kind == "stock":
        pytest.importorskip("diffusers")
    losses = steps(trainer(kind), 30, 30)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.parametrize("name", ["tiny", "tiny-two"])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, name):
    whole = trainer(name=name)
    losses = steps(whole, 8, 8)
    first = trainer(name=name)
    before = steps(first, 4, 8)
    checkpoint.save(first, tmp_path, note="kept")
    second = trainer(seed=99, name=name)
    assert checkpoint.resume(second, tmp_path)["note"] == "kept"
    assert before + steps(second, 4, 8) == losses
    assert second.step == 8 and second.clips == whole.clips and torch.equal(second.loss, whole.loss)
    assert second.losses.keys() == whole.losses.keys()
    for name in whole.named:
        assert torch.equal(second.named[name], whole.named[name]), name
        assert torch.equal(second.ema[name], whole.ema[name]), name


def test_checkpoints_are_safetensors_and_json_only(tmp_path):
    run = trainer()
    for _ in range(2):
        steps(run, 1, 8)
        checkpoint.save(run, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state-00000002.safetensors", "state.json"]


def test_compact_checkpoints_come_in_small_files_and_go_on_nearly_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", 2**20)
    first = trainer(name="tiny-two")
    steps(first, 4, 8)
    checkpoint.save(first, tmp_path, compact=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 1.1 * 2**20
    second = trainer(seed=99, name="tiny-two")
    checkpoint.resume(second, tmp_path)
    assert all(torch.equal(second.named[name], first.named[name]) for name in first.named)
    assert steps(second, 4, 8) == pytest.approx(steps(first, 4, 8), rel=1e-2)


def test_a_mixture_changes_with_progress_and_repeats_by_step():
    recipe = RECIPES["world-video"]
    early = [recipe.at(0.1, step) for step in range(400)]
    late = [recipe.at(0.9, step) for step in range(400)]
    share = lambda drawn: sum(shape.size == 64 for shape, _ in drawn) / len(drawn)  # noqa: E731
    assert share(early) == pytest.approx(0.15, abs=0.06) and share(late) == pytest.approx(0.7, abs=0.08)
    assert early == [recipe.at(0.1, step) for step in range(400)]
    assert {pairs for _, pairs in early + late} == {0.5}
    assert {shape for shape, _ in early + late} == {Shape(32, 128, 6.0, s) for s in (0.85, 0.3)} | {
        Shape(64, 64, 8.0, s) for s in (0.15, 0.7)
    }
    assert RECIPES["world-nano"].at(0.5, 3) == (Shape(32, 256, 6.0, 1.0), 0.0)


def test_real_clips_pass_every_examination():
    spec = MODELS["world-video"]
    rows = [row for size in (32, 64) for row in examine_real(spec, Paper(tuple(GROUPS), prompts=6), size)]
    assert len(rows) == 8 and all(row["acc_all"] == 1 and row["n"] == 6 for row in rows)
    assert missed(spec, rows) == [] and len(missed(spec, [])) == len(spec.gates)
    worse = [{**row, "acc_all": 0.5} if row["group"] == "two" else row for row in rows]
    assert missed(spec, worse) == ["two: acc_all 0.5, needed 0.8"]


@pytest.mark.parametrize("batch", [3, 4, 8])
def test_an_examination_does_not_depend_on_its_batches(batch):
    run = trainer(name="tiny-two")
    steps(run, 2, 8)
    paper = Paper(("one", "two"), prompts=2, seeds=2, steps=2)
    rows = examine(run.model, run.text, MODELS["tiny-two"], paper, 16, batch)
    whole = examine(run.model, run.text, MODELS["tiny-two"], paper, 16, 8)
    assert [row["n"] for row in rows] == [4, 4] and [row["group"] for row in rows] == ["one", "two"]
    for row, expected in zip(rows, whole, strict=True):
        assert row["world_psnr"] == pytest.approx(expected["world_psnr"], abs=0.05)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run = trainer()
    steps(run, 1, 8)
    checkpoint.save(run, tmp_path)
    file = tmp_path / "state.json"
    file.write_text(file.read_text().replace('"batch": 8', '"batch": 9'))
    with pytest.raises(ValueError, match="has other batch: resume with the same options"):
        checkpoint.resume(trainer(), tmp_path)


def test_averaged_weights_are_lent_and_returned():
    run = trainer()
    steps(run, 3, 3)
    before = {name: p.detach().clone() for name, p in run.named.items()}
    with run.averaged():
        assert all(torch.equal(p, run.ema[name]) for name, p in run.named.items())
    assert all(torch.equal(p, before[name]) for name, p in run.named.items())


def test_learning_rate_warms_up_stays_and_decays():
    recipe = RECIPES["world-nano"]
    assert learning_rate(recipe, 0, 0.0) == pytest.approx(recipe.lr / 200)
    assert learning_rate(recipe, 500, 0.6) == pytest.approx(recipe.lr)
    assert learning_rate(recipe, 900, 0.8) == pytest.approx(recipe.lr * 0.51)
    assert learning_rate(recipe, 999, 1.0) == pytest.approx(recipe.lr * 0.02)


def test_a_quarter_of_the_noise_levels_is_high():
    sigma = draw_sigmas(20_000, 1.0, 0.25, torch.Generator().manual_seed(0))
    usual = draw_sigmas(20_000, 1.0, 0.0, torch.Generator().manual_seed(0))
    assert sigma.min() > 0 and sigma.max() < 1
    assert ((sigma > 0.9).float().mean() - 0.75 * (usual > 0.9).float().mean()).item() == pytest.approx(0.25, abs=0.02)


def test_real_clips_are_the_upper_bound():
    facts = evaluate_real(MODELS["world-nano"], n=32)
    assert facts["acc_all"] == 1 and facts["world_psnr"] > 50 and facts["n"] == 32


def test_command_exports_a_model_that_loads_and_resumes(tmp_path, capsys):
    pytest.importorskip("diffusers")
    out, state = tmp_path / "tiny", tmp_path / "state"
    command = [*SMALL, "--out", str(out), "--checkpoint", str(state)]
    assert main([*command, "--steps", "4", "--gate", "0"]) == 0
    names = {file.name for file in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "text.safetensors", "README.md", "log.jsonl"}
    load(out)
    text = (out / "README.md").read_text()
    assert "Toy model" in text and "--out tiny --checkpoint state" in text and str(tmp_path) not in text
    assert main([*command, "--steps", "6", "--resume", "--gate", "1"]) == 1
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "done"] == [4, 6]
    assert [row["passed"] for row in rows if row["event"] == "gate"] == [True, False]
    assert "below the gate" in capsys.readouterr().err


def test_two_objects_are_trained_in_parts_examined_and_exported(tmp_path, capsys):
    pytest.importorskip("diffusers")
    out, state = tmp_path / "two", tmp_path / "state"
    command = [*TWO, "--out", str(out), "--checkpoint", str(state), "--compact", "--gate", "0"]
    budget = ["--seconds", "6", "--reserve", "1"]
    assert main([*command, *budget, "--part-seconds", "2.5"]) == 0
    assert main([*command, *budget, "--resume"]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first, second = (row["step"] for row in rows if row["event"] == "done")
    assert 0 < first < second
    config = json.loads((out / "config.json").read_text())
    assert (config["objects"], config["world"], config["shifts"]) == (2, 2, {"16": 6.0, "24": 8.0})
    judged = {(row["event"], row["group"], row["size"]) for row in config["measured"] if row["steps"] == 8}
    assert judged == {(event, group, size) for event in ("real", "final") for group in GROUPS for size in (16, 24)}
    text = (out / "README.md").read_text()
    assert "One or two objects" in text and "| two, held out, 24 px | 8 steps |" in text
    pipe = load(out)
    x = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    again = pipe.velocity(x, [config["forward"]["prompt"]], 3)
    assert again.flatten()[:5].tolist() == pytest.approx(config["forward"]["first"], abs=1e-4)


def test_seconds_end_a_run(tmp_path):
    options = [*SMALL, "--out", str(tmp_path / "o"), "--checkpoint", str(tmp_path / "c"), "--gate", "0"]
    assert main([*options, "--seconds", "2", "--reserve", "1"]) == 0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], "either --steps or --seconds"),
        (["--steps", "1", "--seconds", "1"], "either --steps or --seconds"),
        (["--steps", "1", "--resume"], "there is no checkpoint in"),
        (["--steps", "1", "--init", "/nowhere"], "there is no checkpoint in"),
    ],
)
def test_wrong_options_end_with_one_sentence(tmp_path, capsys, extra, said):
    with pytest.raises(SystemExit) as end:
        main([*SMALL, "--out", str(tmp_path), "--checkpoint", str(tmp_path / "c"), *extra])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_mixture_refuses_options_of_a_single_size(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*TWO, "--out", str(tmp_path), "--steps", "1", "--batch", "2"])
    assert end.value.code == 2 and "trained on a mixture of sizes" in capsys.readouterr().err


def test_needs_torch_and_safetensors_only(tmp_path):
    missing = ["diffusers", "transformers", "omegaconf", "typer", "rich", "PIL"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}));"
        "from foveal.pipelines.train_world import main;"
        f"sys.exit(main({[*TWO, '--out', str(tmp_path / 'o'), '--checkpoint', str(tmp_path / 'c')]!r}"
        " + ['--steps', '1', '--gate', '0']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert '"network": "WanTwin"' in result.stdout
