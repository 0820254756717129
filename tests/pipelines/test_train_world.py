"""Laws of training: the loss falls, a resumed run repeats an uninterrupted one, the export loads."""

import json
import subprocess
import sys

import pytest
import torch

from foveal.pipelines.shipped import load
from foveal.pipelines.train_world import main
from foveal.pipelines.world import checkpoint
from foveal.pipelines.world.evaluation import evaluate_real, wilson
from foveal.pipelines.world.flow import draw_sigmas
from foveal.pipelines.world.models import MODELS, build_transformer
from foveal.pipelines.world.text import TextTable
from foveal.pipelines.world.training import RECIPES, Trainer, learning_rate, start_from_nothing

SMALL = ["--model", "tiny", "--eval-n", "2", "--final-n", "4", "--evals", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(kind: str = "twin", seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    model = build_transformer(MODELS["tiny"].transformer, kind)
    start_from_nothing(model)
    return Trainer(model, TextTable(64), RECIPES["tiny"], torch.device("cpu"))


def steps(run: Trainer, n: int, total: int) -> list[float]:
    return [run.train_step(run.step / total).item() for _ in range(n)]


@pytest.mark.parametrize("kind", ["twin", "stock"])
def test_loss_falls_in_thirty_steps(kind):
    if kind == "stock":
        pytest.importorskip("diffusers")
    losses = steps(trainer(kind), 30, 30)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    whole = trainer()
    losses = steps(whole, 8, 8)
    first = trainer()
    before = steps(first, 4, 8)
    checkpoint.save(first, tmp_path, note="kept")
    second = trainer(seed=99)
    assert checkpoint.resume(second, tmp_path)["note"] == "kept"
    assert before + steps(second, 4, 8) == losses
    assert second.step == 8 and torch.equal(second.loss, whole.loss)
    for name in whole.named:
        assert torch.equal(second.named[name], whole.named[name]), name
        assert torch.equal(second.ema[name], whole.ema[name]), name


def test_checkpoints_are_safetensors_and_json_only(tmp_path):
    run = trainer()
    for _ in range(2):
        steps(run, 1, 8)
        checkpoint.save(run, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state-00000002.safetensors", "state.json"]


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


def test_wilson_matches_the_published_example():
    assert wilson(256, 256) == pytest.approx((0.985, 1.0), abs=5e-4)
    assert wilson(63, 64) == pytest.approx((0.917, 0.997), abs=1e-3)


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


def test_needs_torch_and_safetensors_only(tmp_path):
    missing = ["diffusers", "transformers", "omegaconf", "typer", "rich", "PIL"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}));"
        "from foveal.pipelines.train_world import main;"
        f"sys.exit(main({[*SMALL, '--out', str(tmp_path / 'o'), '--checkpoint', str(tmp_path / 'c')]!r}"
        " + ['--steps', '1', '--gate', '0']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert '"network": "WanTwin"' in result.stdout
