"""Laws of the small LINA in use: loading, sampling, refusing, and its place in runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lina import make_lina

from foveal.pipelines.config import build, load
from foveal.pipelines.engine import execute
from foveal.pipelines.errors import UserError
from foveal.pipelines.lina.data import FASHION
from foveal.pipelines.lina.evaluation import balanced
from foveal.pipelines.metrics import choose
from foveal.pipelines.shipped import ASSETS, cards, shipped
from foveal.pipelines.shipped import load as load_model

CONFIG = Path(__file__).parents[2] / "configs" / "lina_fashion.yaml"
SHIPPED = ASSETS / "lina-fashion" / "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_lina(tmp_path_factory.mktemp("lina"))


@pytest.fixture(scope="module")
def pipe(one_thread, folder):
    return load_model(folder)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- loading
def test_the_card_says_what_the_folder_holds(pipe):
    card = pipe.card
    assert (card.kind, card.tokens, card.grid, card.size, card.heads, card.head_dim) == (
        "lina",
        16,
        (1, 4, 4),
        8,
        2,
        16,
    )
    assert card.params == sum(p.numel() for p in pipe.model.parameters()) and card.toy and "toy" in card.note
    assert card.available and card.files == ("model.safetensors", "judge.safetensors") and card.sizes == (8,)


def test_loading_needs_no_diffusers(folder):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'diffusers': raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"import foveal; print(foveal.load({str(folder)!r})('bar', 1, 1).images.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert "torch.Size([1, 1, 8, 8])" in done.stdout, done.stderr[-1000:]


def test_a_changed_file_and_another_architecture_are_refused(tmp_path):
    made = make_lina(tmp_path)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "network": {**config["network"], "decoder_depth": 2}}))
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        load_model(made)
    with (made / "judge.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="not the recorded file"):
        load_model(made)


# ---- sampling
def test_a_sample_is_its_label_and_its_generator(pipe):
    both = pipe(["bar", 1], generator=seeded(0, 1)).images
    assert both.shape == (2, 1, 8, 8) and both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(pipe("cross", generator=seeded(1)).images[0], both[1], rtol=0, atol=1e-4)
    assert torch.equal(pipe(["bar", 1], generator=seeded(0, 1)).images, both)
    one = [pipe(["bar", "bar"], generator=torch.Generator().manual_seed(3)).images for _ in range(2)]
    assert torch.equal(*one) and not torch.equal(one[0][0], one[0][1])


def test_every_output_type_is_the_same_picture(pipe):
    made = {kind: pipe([0, 3], generator=seeded(5, 6), output_type=kind) for kind in ("pt", "np", "pil", "latent")}
    assert np.array_equal(made["np"].images, made["pt"].images.numpy())
    assert torch.equal(made["latent"].images, made["pt"].latents)
    assert [p.size for p in made["pil"].images] == [(8, 8)] * 2 and made["pil"].images[0].mode == "L"
    assert np.array_equal(np.asarray(made["pil"].images[1]), (made["np"].images[1, 0] * 255).round().astype("uint8"))


def test_steps_and_callbacks_are_those_asked_for(pipe):
    calls, seen = [], []
    hook = pipe.model.head.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe("bar", 2, 3, callback_on_step_end=lambda p, step, t, facts: seen.append((step, facts["latents"].shape)))
    hook.remove()
    assert len(calls) == 2 * 3 and seen == [(0, (1, 1, 8, 8)), (1, (1, 1, 8, 8))]


def test_the_null_class_is_a_class_and_half_precision_samples(folder):
    pipe = load_model(folder, dtype=torch.bfloat16)
    images = pipe([4, 0], guidance_scale=3.0, generator=seeded(0, 1)).images
    assert images.dtype == torch.float32 and images.isfinite().all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"class_labels": "barr"}, "no class 'barr' .nearest: 'bar'."),
        ({"class_labels": [5]}, "integers from 0 to 4"),
        ({"class_labels": []}, "at least one"),
        ({"output_type": "jpg"}, "choose one of pt, np, pil, latent"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_diffusion_steps": 0}, "at least 1 is needed"),
        ({"generator": seeded(0, 1)}, "a list of 2 for 1 labels"),
    ],
    ids=["name", "number", "none", "output", "guidance", "steps", "flow", "generators"],
)
def test_what_does_not_fit_is_one_sentence(pipe, call, said):
    with pytest.raises(UserError, match=said):
        pipe(**{"class_labels": "bar", **call})


# ---- runs
def study(folder, output, **changes):
    plain = {
        "model": str(folder), "output": str(output), "prompts": ["bar", "cross"], "seeds": [0, 1], "methods": [{"name": "dense"}],
        "metrics": ["acc_class"], "batch": 2, "operator_rounds": 0, "noise_floor_samples": 0, **changes,
    }  # fmt: skip
    return execute(build(plain)).document["studies"][0]


def test_a_run_is_judged_timed_and_recorded(one_thread, folder, pipe, tmp_path):
    found = study(folder, tmp_path / "run", rounds=1, metrics=["acc_class", "psnr"])
    (method,) = found["methods"]
    assert method["implementation"] == "linear" and len(method["layers"]) == 3 and found["model"]["kind"] == "lina"
    speed = method["speed"]
    assert 0 < speed["attention"]["median_s"] < speed["transformer"]["median_s"] <= speed["end_to_end"]["median_s"]
    (entry,) = method["metrics"]
    names = ("square", "cross", "bar", "corners")
    wanted = [
        float(names[int(pipe.recognise(pipe(name, generator=seeded(seed)).images)[0])] == name)
        for name in ("bar", "cross") for seed in (0, 1)
    ]  # fmt: skip
    assert entry["id"] == "acc_class" and entry["per_sample"] == wanted and not entry["faithful"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "small grey pictures" in page and "synthetic world" not in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": [{"name": "grat"}]}, "softmax and linear attention cannot be swapped without training"),
        ({"prompts": ["barr"]}, "nearest: 'bar'"),
        ({"height": 16, "width": 16}, "makes single pictures of 8 x 8 pixels"),
        ({"frames": 2}, "makes single pictures"),
        ({"sampler": {"guidance": 0.5}}, "at least 1"),
        ({"metrics": ["emoji_psnr"]}, "reads only images of the shipped emoji model"),
    ],
    ids=["method", "class", "size", "frames", "guidance", "metric"],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_made(folder, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        study(folder, tmp_path / "run", **changes)


def test_other_models_are_not_read_by_the_judge():
    chosen, skipped = choose(["acc_class"], world_model=True)
    assert not chosen and "LINA" in skipped[0]["reason"]


def test_the_config_asks_for_classes_there_are():
    (config,) = load(CONFIG).studies
    assert config.model == "lina-fashion" and set(config.prompts) == set(FASHION)


# ---- what ships
def test_the_shipped_model_makes_what_it_is_asked_for():
    assert "lina-fashion" in shipped()
    card = next(card for card in cards() if card.id == "lina-fashion")
    assert SHIPPED.stat().st_size <= 4_000_000 and (card.tokens, card.size) == (64, 28)
    pipe = load_model("lina-fashion")
    labels = balanced(40, 10)
    images = pipe(labels.tolist(), 8, 10, generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (40, 1, 28, 28)
    assert (pipe.recognise(images) == labels).float().mean() > 0.7
    text = (card.folder / "README.md").read_text()
    assert "oy model" in text and "The feature network is ours" in text
