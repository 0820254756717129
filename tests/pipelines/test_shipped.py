"""Laws of the shipped models and of loading them."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch

from foveal.pipelines import shipped
from foveal.pipelines.errors import UserError
from foveal.pipelines.shipped import ASSETS, cards, load
from foveal.pipelines.world.examination import GROUPS, missed
from foveal.pipelines.world.export import FILES, export
from foveal.pipelines.world.models import MODELS, build_transformer
from foveal.pipelines.world.prompts import validation_prompts
from foveal.pipelines.world.reader import read, score
from foveal.pipelines.world.text import TextTable
from foveal.pipelines.world.vocabulary import VOCAB, parse

CARDS = [card for card in cards() if card.kind == "world"]
MAX_BYTES = 16 * 2**20


@pytest.fixture
def tiny(tmp_path):
    """An untrained model in a folder called tiny."""
    torch.manual_seed(0)
    weights = {f"model.{k}": v for k, v in build_transformer(MODELS["tiny"].transformer, "twin").state_dict().items()}
    weights |= {f"text.{k}": v for k, v in TextTable(64).state_dict().items()}
    export(tmp_path / "tiny", MODELS["tiny"], weights)
    return tmp_path / "tiny"


def test_cards_say_what_there_is():
    known = {card.id: card for card in cards()}
    assert {"world-nano", "world-video"} <= set(known) and shipped.shipped() == sorted(known)
    video, nano = known["world-video"], known["world-nano"]
    assert (video.frames, video.size, video.tokens, video.grid, video.params) == (16, 64, 4096, (16, 16, 16), 4_345_840)
    assert (video.steps, video.guidance, video.shift, video.heads, video.head_dim) == (8, 1.0, 8.0, 3, 64)
    assert (nano.frames, nano.size, nano.tokens, nano.params, nano.layers) == (8, 32, 512, 1_580_720, 6)
    assert video.available and video.toy and nano.toy and "toy" in video.note


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_configs_are_the_specs_in_code(card):
    config, spec = json.loads((card.folder / "config.json").read_text()), MODELS[card.id]
    assert config["transformer"] == {**spec.transformer, "patch_size": list(spec.transformer["patch_size"])}
    assert tuple(config["words"]) == VOCAB
    for key in ("frames", "size", "steps", "guidance", "shift"):
        assert config[key] == getattr(spec, key)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_files_are_the_recorded_ones(card):
    config = json.loads((card.folder / "config.json").read_text())
    assert card.sha256 == config["files"]["model.safetensors"]["sha256"]
    for name in FILES:
        file = card.folder / name
        assert hashlib.sha256(file.read_bytes()).hexdigest() == config["files"][name]["sha256"]
        assert file.stat().st_size < MAX_BYTES
    text = (card.folder / "README.md").read_text()
    assert "oy model" in text and "Held out" in text and "real clips (upper bound)" in text


def test_listing_models_does_not_import_diffusers():
    code = "import sys; from foveal.pipelines import shipped; shipped.cards(); assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_weights_load_strictly_in_the_stock_class(card):
    diffusers = pytest.importorskip("diffusers")
    pipe = load(card.id)
    assert type(pipe.transformer) is diffusers.WanTransformer3DModel and not pipe.transformer.training
    assert pipe.card == card and pipe.config["steps"] == card.steps
    assert sum(p.numel() for p in pipe.transformer.parameters()) == card.params
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


def test_forward_is_the_recorded_one():
    pytest.importorskip("diffusers")
    recorded = json.loads((ASSETS / "world-video" / "config.json").read_text())["forward"]
    x = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    v = load("world-video").velocity(x, [recorded["prompt"]], 3)
    torch.testing.assert_close(v.flatten()[:5], torch.tensor(recorded["first"]), atol=1e-4, rtol=0)
    assert v.mean().item() == pytest.approx(recorded["mean"], abs=1e-4)
    assert v.std().item() == pytest.approx(recorded["std"], abs=1e-4)


def test_recorded_measurements_reach_the_recorded_gates():
    config = json.loads((ASSETS / "world-video" / "config.json").read_text())
    rows = [row for row in config["measured"] if row["event"] == "final" and row["steps"] == config["steps"]]
    spec = MODELS["world-video"]
    assert [list(gate) for gate in spec.gates] == config["gates"] and missed(spec, rows) == []
    assert {(row["group"], row["size"]) for row in rows} == {(group, size) for group in GROUPS for size in spec.sizes}


def test_cards_know_objects_and_sizes():
    known = {card.id: card for card in CARDS}
    assert (known["world-video"].objects, known["world-video"].sizes) == (2, (32, 64))
    assert (known["world-nano"].objects, known["world-nano"].sizes, known["world-nano"].world) == (1, (32,), 1)


def test_a_model_of_one_object_refuses_two_in_one_sentence():
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match="names two objects, but world-nano was trained on one"):
        load("world-nano")(validation_prompts(1, objects=2), [0])


def test_one_file_serves_both_sizes():
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match="world-video was not trained at size 48: use 32, 64"):
        load("world-video", size=48)
    pipe, prompts = load("world-video", size=32), validation_prompts(4, objects=0)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(prompts, seeds=[0, 1, 2, 3]).frames
    assert frames.shape[-1] == 32 and pipe.scheduler.sigmas[1] == pytest.approx(6 * 0.875 / (1 + 5 * 0.875))
    reading = read(frames)
    assert score(reading, [parse(prompt) for prompt in prompts])["acc_all"].mean() >= 0.75
    assert reading.world_psnr.mean() > 28


@pytest.mark.slow
def test_world_video_shows_what_was_asked():
    pytest.importorskip("diffusers")
    prompt = "a large orange ring moving down-right and a small cyan square moving up on a navy striped background"
    pipe = load("world-video")
    pipe.set_progress_bar_config(disable=True)
    reading = read(pipe([prompt], seeds=[0]).frames)
    assert reading.objects.tolist() == [2] and score(reading, [parse(prompt)])["acc_all"].tolist() == [1]
    assert (reading.world_psnr > 31).all()


def test_world_nano_shows_what_was_asked():
    pytest.importorskip("diffusers")
    pipe, prompts = load("world-nano"), validation_prompts(16)
    pipe.set_progress_bar_config(disable=True)
    reading = read(pipe(prompts, seeds=list(range(16))).frames)
    assert score(reading, [parse(prompt) for prompt in prompts])["acc_all"].mean() >= 15 / 16
    assert reading.world_psnr.mean() > 30


def test_lower_precision_keeps_norms_and_tables_in_fp32(tiny):
    pytest.importorskip("diffusers")
    pipe = load(tiny, dtype=torch.bfloat16)
    block = pipe.transformer.blocks[0]
    assert block.attn1.to_q.weight.dtype == torch.bfloat16
    assert block.scale_shift_table.dtype == block.norm2.weight.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    assert pipe(validation_prompts(1), [0]).frames.dtype == torch.float32


def test_a_path_loads_and_the_card_records_it(tiny):
    pytest.importorskip("diffusers")
    assert load(str(tiny)).card.folder == tiny and load(tiny).card.id == "tiny"


def test_weights_directory_is_only_looked_at_last(tiny, monkeypatch, tmp_path):
    monkeypatch.delenv("FOVEAL_WEIGHTS_DIR", raising=False)
    with pytest.raises(UserError, match="unknown model 'tiny'"):
        shipped.find("tiny")
    monkeypatch.setenv("FOVEAL_WEIGHTS_DIR", str(tmp_path))
    assert shipped.find("tiny") == tiny
    shutil.copytree(tiny, tmp_path / "world-video")
    assert shipped.find("world-video") == ASSETS / "world-video"


def test_weights_directory_fills_in_missing_files(tiny, monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "tiny").mkdir(parents=True)
    shutil.copy(tiny / "config.json", package / "tiny")
    monkeypatch.setattr(shipped, "ASSETS", package)
    monkeypatch.delenv("FOVEAL_WEIGHTS_DIR", raising=False)
    with pytest.raises(UserError, match=r"tiny/model.safetensors is missing: reinstall foveal, train it"):
        load("tiny")
    monkeypatch.setenv("FOVEAL_WEIGHTS_DIR", str(tmp_path))
    assert load("tiny").card.folder == tiny


@pytest.mark.parametrize(
    ("name", "said"),
    [("world-vidoe", "unknown model 'world-vidoe' .nearest: 'world-video'."), ("./nowhere", "no model at nowhere")],
)
def test_unknown_names_get_the_nearest(name, said):
    with pytest.raises(UserError, match=said):
        load(name)


def break_text_missing(folder):
    (folder / "text.safetensors").unlink()


def break_truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def break_flip_a_bit(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def record_hash(folder):
    config = json.loads((folder / "config.json").read_text())
    config["files"]["model.safetensors"]["sha256"] = hashlib.sha256(
        (folder / "model.safetensors").read_bytes()
    ).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def break_truncate_and_record(folder):
    break_truncate(folder)
    record_hash(folder)


def break_swap_files(folder):
    shutil.copy(folder / "text.safetensors", folder / "model.safetensors")
    record_hash(folder)


def break_words(folder):
    config = json.loads((folder / "config.json").read_text())
    config["words"][3] = "pink"
    (folder / "config.json").write_text(json.dumps(config))


def break_config(folder):
    (folder / "config.json").write_text('{"id": "tiny"')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_text_missing, "text.safetensors is missing"),
        (break_truncate, "is not the recorded file .*truncated or changed"),
        (break_flip_a_bit, "is not the recorded file"),
        (break_truncate_and_record, "is not a readable safetensors file"),
        (break_swap_files, "does not fit the architecture"),
        (break_words, "lists other words"),
        (break_config, "is not a model's config"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_folders_are_refused_in_one_sentence(tiny, damage, said):
    pytest.importorskip("diffusers")
    damage(tiny)
    with pytest.raises(UserError, match=said) as refusal:
        load(tiny)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
