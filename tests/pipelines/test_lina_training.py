"""Laws of LINA's training: its data, masks, judge, loss, checkpoints, and the program from end to end."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import torch

from foveal.pipelines.lina import checkpoint
from foveal.pipelines.lina.card import card
from foveal.pipelines.lina.data import FASHION, SHAPES, fitted, load_data, shapes, to_network, to_pictures
from foveal.pipelines.lina.judge import Judge, frechet, look, mean_interval, train_judge
from foveal.pipelines.lina.models import MODELS, RECIPES
from foveal.pipelines.lina.training import Trainer, draw, hidden_shares, learning_rate, most_visible
from foveal.pipelines.train_lina import main
from foveal.vision.lina import LinaModel

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE, SPEC = RECIPES["tiny"], MODELS["tiny"]


def trainer(**changes):
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPE, **changes)
    return Trainer(LinaModel(SPEC.config), shapes(200, 8, 0), recipe, torch.device("cpu"))


# ---- data
def test_idx_files_are_read_padded_and_averaged(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 12), ("t10k", 6)):
        pictures, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10
        for name, magic, values in (("images-idx3", 3, pictures), ("labels-idx1", 1, labels)):
            head = bytes([0, 0, 8, magic]) + np.array(values.shape, ">i4").tobytes()
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    data = load_data("fashion", tmp_path, 32)
    assert (
        data.classes == FASHION
        and data.train.images.shape == (12, 32, 32)
        and data.test.labels.tolist() == list(range(6))
    )
    assert (
        torch.equal(data.test.images[:, 2:-2, 2:-2], torch.from_numpy(pictures)) and data.test.images[:, :2].sum() == 0
    )
    assert len(data.for_judge) + len(data.unseen_by_judge) == 12 and len(data.unseen_by_judge) == 2
    small = load_data("fashion", tmp_path, 8)
    assert abs(float(small.test.images[0, 3, 3]) - data.test.images[0, 12:16, 12:16].float().mean()) <= 0.5
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09x"))
    with pytest.raises(ValueError, match="cut off: 1 of 9"):
        load_data("fashion", tmp_path, 32)
    with pytest.raises(ValueError, match="give --data the folder"):
        load_data("fashion", None, 32)


def test_pictures_go_to_the_network_and_back():
    pictures = shapes(8, 28, 0).images
    padded = fitted(pictures, 32)
    torch.testing.assert_close(to_pictures(to_network(padded), 28)[:, 0] * 255, pictures.float(), rtol=0, atol=1e-3)
    assert len(set(shapes(40, 8, 0).labels.tolist())) == len(SHAPES)


# ---- masks
def test_hidden_shares_are_a_truncated_normal():
    recipe = dataclasses.replace(RECIPE, mask_low=0.7, mask_std=0.25)
    found = hidden_shares(20_000, recipe, torch.Generator().manual_seed(0))
    assert found.min() >= 0.7 and found.max() <= 1
    grid = torch.linspace(0.7, 1, 3001)
    density = torch.exp(-0.5 * ((grid - 1) / 0.25) ** 2)
    assert float(found.mean()) == pytest.approx(float((grid * density).sum() / density.sum()), abs=2e-3)


def test_a_step_is_its_number_and_shows_no_token_twice():
    once, again = (draw(RECIPE, SPEC.config, 100, torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(once).values(), vars(again).values(), strict=True))
    assert once.visible.shape == (RECIPE.batch, most_visible(RECIPE, 16)) == (32, 12)
    assert all(len(set(row)) == 12 for row in once.visible.tolist()) and len(set(once.valid.sum(1).tolist())) > 3


def test_visible_tokens_cost_nothing():
    run, seen = trainer(mask_low=0.5), []

    def keep(module, args, out):
        out.retain_grad()
        seen.append(out)

    hook = run.model.head.register_forward_hook(keep)
    torch.nn.init.normal_(run.model.head.out.weight, std=0.1)
    run.loss_of(0).backward()
    hook.remove()
    given = draw(run.recipe, SPEC.config, 200, torch.Generator().manual_seed(run.recipe.seed * 1_000_003))
    shown = torch.zeros(32, 17).scatter(1, torch.where(given.valid, given.visible, 16), 1.0)[:, :16].bool()
    silent = seen[0].grad.abs().sum((0, 3)) == 0
    assert torch.equal(silent, shown)


# ---- learning
def test_the_loss_falls_and_the_average_follows():
    run = trainer()
    losses = [run.train_step(i / 80).item() for i in range(80)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert all((run.ema[name] - p).abs().max() < 0.2 for name, p in run.model.named_parameters())
    before = run.model.head.out.weight.clone()
    with run.averaged():
        assert torch.equal(run.model.head.out.weight, run.ema["head.out.weight"])
    assert torch.equal(run.model.head.out.weight, before)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, first = trainer(), trainer()
    for i in range(6):
        whole.train_step(i / 6)
        if i < 3:
            first.train_step(i / 6)
    checkpoint.save(first, tmp_path, note="kept")
    second = trainer()
    assert checkpoint.resume(second, tmp_path)["note"] == "kept" and second.step == 3
    for i in range(3, 6):
        second.train_step(i / 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert all(torch.equal(whole.ema[name], second.ema[name]) for name in whole.ema)
    with pytest.raises(ValueError, match="other batch"):
        checkpoint.resume(trainer(batch=8), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.resume(trainer(), tmp_path / "none")


def test_the_learning_rate_warms_up_and_falls():
    assert learning_rate(RECIPE, 0, 0.0) == pytest.approx(RECIPE.lr / RECIPE.warmup)
    assert learning_rate(RECIPE, 50, 0.3) == RECIPE.lr and learning_rate(RECIPE, 50, 1.0) == pytest.approx(
        0.02 * RECIPE.lr
    )


# ---- the judge
def test_the_judge_learns_the_shapes_and_keeps_what_it_ships():
    pictures = shapes(400, 8, 0)
    judge = train_judge(pictures, 4, 60, batch=64)
    features, seen = look(judge, to_network(shapes(100, 8, 5).images))
    assert features.shape == (100, 64) and (seen == shapes(100, 8, 5).labels).float().mean() > 0.9
    again = Judge(4)
    again.load_state_dict({name: value.half() for name, value in judge.state_dict().items()})
    assert torch.equal(look(again, to_network(pictures.images))[0], look(judge, to_network(pictures.images))[0])


def test_the_distance_is_that_of_normal_distributions():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4_000, 3, generator=rng, dtype=torch.float64)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 2) == pytest.approx(12, abs=1e-9)  # means alone
    assert frechet(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * float(torch.cov(x.mT).trace()), abs=1e-9)
    turned = x @ torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))[0]
    assert frechet(x, turned) == pytest.approx(frechet(turned, x), abs=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        frechet(x[:1], x)


def test_intervals_of_few_values_are_students():
    assert mean_interval([1.0]) is None
    low, high = mean_interval([9.0, 10.0, 11.0])
    assert (low, high) == pytest.approx((10 - 4.303 / 3**0.5, 10 + 4.303 / 3**0.5))


# ---- the program
def test_the_program_trains_judges_exports_and_goes_on(tmp_path, capsys):
    common = ["--model", "tiny", "--judge-steps", "5", "--final-n", "40", "--final-batches", "2", "--finals", "1", "--eval-n", "8",
              "--copies-n", "8", "--shown", "1", "--evals", "1", "--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "state")]  # fmt: skip
    assert main([*common, "--steps", "6", "--gate", "0"]) == 0
    assert main([*common, "--steps", "10", "--gate", "1.1", "--resume"]) == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kind"] == "lina" and set(config["files"]) == {"model.safetensors", "judge.safetensors"}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "10 steps, 320 pictures" in text and "The feature network is ours" in text and "not FID" in text
    assert text.count("real pictures the judge never saw") == 1 and str(tmp_path) not in text
    sizes = [path.stat().st_size for path in (tmp_path / "state").iterdir()]
    assert len(sizes) == 5 and max(sizes) < 16 * 2**20
    for wrong, said in (
        ([], "give either --steps or --seconds"),
        (["--steps", "1", "--model", "lina-fashion"], "give --data"),
    ):
        with pytest.raises(SystemExit):
            main([*common, *wrong])
        assert said in capsys.readouterr().err


def test_every_model_fits_its_files():
    for name, spec in MODELS.items():
        model = LinaModel(spec.config, device="meta")
        params = sum(p.numel() for p in model.parameters())
        assert 2 * params < 3_980_000 and name in RECIPES
        assert spec.id in card(spec, RECIPES[name], ["a"], [], params, [])
