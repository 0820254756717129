"""Laws of the emoji model: twin, tokens, sampler, pipeline, training, export, and the shipped one."""

import json

import pytest
import torch
from tiny_emoji import PROMPTS, make_model

from foveal.pipelines import shipped
from foveal.pipelines.emoji import checkpoint
from foveal.pipelines.emoji.evaluation import evaluate_real, validation_prompts
from foveal.pipelines.emoji.flow import pack, sample, seeded_noise, token_ids, unpack, velocity
from foveal.pipelines.emoji.models import MODELS, build_transformer
from foveal.pipelines.emoji.reader import read, score
from foveal.pipelines.emoji.text import TextTable
from foveal.pipelines.emoji.training import RECIPES, EmojiTrainer, start_from_nothing
from foveal.pipelines.emoji.vocabulary import CANVASES, attributes_of, parse, word_ids
from foveal.pipelines.errors import UserError
from foveal.pipelines.train_emoji import main

CARDS = [card for card in shipped.cards() if card.kind == "emoji"]


@pytest.fixture(autouse=True)
def single(one_thread):
    """One thread."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def pipe(tiny):
    pytest.importorskip("diffusers")
    found = shipped.load(tiny)
    found.set_progress_bar_config(disable=True)
    return found


def ids(size):
    return word_ids(attributes_of([parse(prompt) for prompt in PROMPTS]), size)


# ---- network and tokens
@pytest.mark.parametrize("name", ["tiny", "emoji-flux"])
def test_the_twin_is_the_stock_network(name):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    stock, twin = (build_transformer(MODELS[name].transformer, kind) for kind in ("stock", "twin"))
    for p in stock.parameters():
        torch.nn.init.normal_(p, std=0.05)
    twin.load_state_dict(stock.state_dict(), strict=True)
    x, sigma, encoding = torch.randn(2, 3, 64, 64), torch.tensor([0.3, 0.95]), TextTable()(ids(64))
    with torch.no_grad():
        torch.testing.assert_close(
            velocity(twin, x, sigma, encoding), velocity(stock, x, sigma, encoding), atol=1e-5, rtol=0
        )


def test_tokens_are_flux_packed_patches_in_row_major_order():
    x = torch.randn(2, 3, 64, 64)
    tokens = pack(x)
    assert tokens.shape == (2, 256, 48) and torch.equal(unpack(tokens), x)
    assert torch.equal(tokens[0, 17], x[0, :, 4:8, 4:8].flatten())
    image, text = token_ids(64, torch.device("cpu"))
    assert image[17].tolist() == [0, 1, 1] and text.shape == (8, 3) and not text.any()
    assert token_ids(64, torch.device("cpu"))[0] is image  # hosts look at a tensor once


# ---- pipeline
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_pipeline_samples_as_the_plain_sampler(pipe, guidance):
    out = pipe(PROMPTS, [3, 4], steps=2, guidance=guidance, size=128)
    settings = {"steps": 2, "shift": 4.0, "guidance": guidance}
    plain = sample(pipe.transformer, pipe.text, ids(128), seeded_noise([3, 4], 128), **settings)
    torch.testing.assert_close(out.images, plain, atol=1e-5, rtol=0)
    assert out.images.shape == (2, 3, 128, 128) and out.images.std() > 0.01


def test_a_sample_depends_on_its_own_seed_only(pipe):
    both, one = pipe(PROMPTS, [3, 4], steps=1).images, pipe(PROMPTS[1:], [4], steps=1).images
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=0)


def test_velocity_is_the_step_of_the_path(pipe):
    seen = []
    pipe(PROMPTS, [3, 4], steps=2, callback_on_step_end=lambda *args: seen.append(args[3]) or {})
    again = pipe.velocity(seen[1]["latents_before"], PROMPTS, 1, steps=2)
    torch.testing.assert_close(again, seen[1]["velocity"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 100}, "use a multiple of 64"),
        ({"prompts": ["a fox"], "seeds": [0]}, "does not fit the grammar"),
        ({"seeds": [0]}, "2 prompts and 1 seeds"),
        ({"steps": 0}, "steps is 0"),
        ({"latents": torch.zeros(2, 3, 32, 32)}, r"\(2, 3, 64, 64\) is needed"),
    ],
    ids=["size", "prompt", "seeds", "steps", "latents"],
)
def test_wrong_requests_are_refused_in_a_sentence(pipe, change, said):
    with pytest.raises(UserError, match=said):
        pipe(**{"prompts": PROMPTS, "seeds": [0, 1], **change})


def test_full_density_equals_dense(pipe):
    import foveal

    dense = pipe(PROMPTS[:1], [0], steps=1, size=128).images
    with foveal.accelerate(pipe, "grat", group=(1, 16, 16), b=4) as handle:
        sparse = pipe(PROMPTS[:1], [0], steps=1, size=128).images
        assert handle.record.to_dict()["density"] == 1
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)
    with foveal.accelerate(pipe, "grat", group=(1, 16, 16), pattern="X") as handle:
        pipe(PROMPTS[:1], [0], steps=1, size=128)
        assert 0.5 < handle.record.to_dict()["density"] < 1


def test_lower_precision_runs(tiny):
    pytest.importorskip("diffusers")
    found = shipped.load(tiny, dtype=torch.bfloat16)
    found.set_progress_bar_config(disable=True)
    assert found.transformer.dtype == torch.bfloat16 and found(PROMPTS[:1], [0], steps=1).images.dtype == torch.float32


# ---- folder
def test_the_card_says_what_the_config_says(tiny, pipe):
    card = pipe.card
    assert (card.kind, card.id, card.frames, card.size, card.grid, card.tokens) == (
        "emoji",
        "tiny",
        1,
        64,
        (1, 16, 16),
        256,
    )
    assert card.sizes == CANVASES and card.shift == 3.0 and card.layers == 2 and card.toy and "toy" in card.note


def test_other_words_are_refused(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    for name in ("model.safetensors", "text.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"words": config["words"][::-1]}))
    with pytest.raises(UserError, match="lists other words than this version"):
        shipped.load(tmp_path)


# ---- training
def trainer(seed=0):
    torch.manual_seed(seed)
    model = build_transformer(MODELS["tiny"].transformer, "twin")
    start_from_nothing(model)
    return EmojiTrainer(model, TextTable(), RECIPES["tiny"], torch.device("cpu"))


def test_a_fresh_network_predicts_nothing():
    run = trainer()
    with torch.no_grad():
        v = velocity(run.model, torch.randn(2, 3, 64, 64), torch.tensor([0.3, 0.9]), run.text(ids(64)))
    assert not v.any()


def test_loss_falls_in_twenty_steps():
    run = trainer()
    losses = [run.train_step(0.0).item() for _ in range(20)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]) and run.seen == {64: 160, 128: 0, 256: 0}


def test_a_resumed_run_goes_on_from_the_same_place(tmp_path):
    first = trainer()
    for _ in range(4):
        first.train_step(0.0)
    checkpoint.save(first, tmp_path, note="kept")
    second = trainer(seed=9)
    assert checkpoint.resume(second, tmp_path, tmp_path / "nowhere")["note"] == "kept"
    assert (second.step, second.seen) == (4, first.seen)
    for name, p in first.named.items():
        torch.testing.assert_close(second.named[name], p, atol=1e-3, rtol=1e-3)
    assert second.train_step(0.0).item() == pytest.approx(first.train_step(0.0).item(), rel=1e-2)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".safetensors"] * 3]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run = trainer()
    run.train_step(0.0)
    checkpoint.save(run, tmp_path)
    other = EmojiTrainer(run.model, run.text, RECIPES["emoji-flux"], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"has other .*stages.*: resume with the same options"):
        checkpoint.resume(other, tmp_path, tmp_path)


def test_the_script_exports_a_model_that_loads(tmp_path, capsys):
    pytest.importorskip("diffusers")
    options = ["--model", "tiny", "--steps", "3", "--evals", "0", "--final-n", "1", "--final-seeds", "1"]
    places = ["--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "state")]
    few = ["--finals", "1", "--shown", "0", "--network", "twin"]
    assert main([*options, *places, *few]) == 1  # nobody learns in three steps
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events == ["start", "train", "done", "real", "real", "final", "gate"]
    assert shipped.load(tmp_path / "out").card.id == "tiny"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "rendered scenes (upper bound)" in text and "Noto Color Emoji" in text and str(tmp_path) not in text


def test_rendered_scenes_are_the_upper_bound():
    facts = evaluate_real(64, n=8, seeds=2)
    assert facts["acc_all"] == 1 and facts["emoji_psnr"] == 90 and len(set(validation_prompts(8))) == 8


# ---- the shipped one
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_shipped_weights_load_strictly_in_the_stock_class(card):
    diffusers = pytest.importorskip("diffusers")
    found = shipped.load(card.id)
    assert type(found.transformer) is diffusers.FluxTransformer2DModel and found.card == card
    assert sum(p.numel() for p in found.transformer.parameters()) == card.params
    assert (card.folder / "model.safetensors").stat().st_size < 16 * 2**20


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_shipped_weights_show_what_was_asked(card):
    """Below the recorded rate at 64 px, its cheapest size, by no more than chance allows with 12 prompts."""
    pytest.importorskip("diffusers")
    found, prompts = shipped.load(card.id), validation_prompts(12)
    found.set_progress_bar_config(disable=True)
    reading = read(found(prompts, list(range(12)), size=64).images)
    rate = score(reading, [parse(prompt) for prompt in prompts])["acc_all"].mean().item()
    config = json.loads((card.folder / "config.json").read_text())
    assert rate >= config["rates"]["64"] - 0.25
