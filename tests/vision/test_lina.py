"""Laws of LINA: sizes of the paper, what the trunk may see, generation, learning."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from random_lina import TINY, draw, generators, tiny

from foveal.vision.lina import LinaModel
from foveal.vision.lina_config import LinaConfig, preset
from foveal.vision.lina_counting import image_macs, parameters
from foveal.vision.lina_generate import Sampling, counts_of_steps, generate
from foveal.vision.lina_head import FlowHead, denoise, noise_levels

COUNTS = {  # millions: connector, trunk, head, all
    "lina_nano_digits": (None, None, None, 0.84),
    "lina_small_256": (113.5, 227.3, 20.9, 363.2),
    "lina_d48w1024": (201.6, 403.7, 37.1, 644.7),
    "lina_d48w1536": (453.4, 907.4, 83.1, 1448.2),
    "lina_t2i_256": (None, None, None, 1450.6),
    "lina_t2i_512": (None, None, None, 1451.1),
    "lina_t2i_1024": (None, None, None, 1453.1),
}
EXACT = {
    "lina_small_256": 363_190_288,
    "lina_d48w1024": 644_685_840,
    "lina_d48w1536": 1_448_243_216,
    "lina_fashion": 1_974_800,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- sizes
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_those_of_the_paper(name):
    found = parameters(preset(name))
    for part, millions in zip(("connector", "trunk", "head", "total"), COUNTS[name], strict=True):
        assert millions is None or found[part] / 1e6 == pytest.approx(millions, abs=0.06 if part != "total" else 0.05)


@pytest.mark.parametrize("name", EXACT)
def test_parameter_counts_are_exact(name):
    assert parameters(preset(name))["total"] == EXACT[name]


def test_gates_are_few():
    for name, n, millions in (("lina_d48w1536", 320, 0.16), ("lina_t2i_1024", 5120, 2.6)):
        model = LinaModel(preset(name), device="meta")
        gates = [p for key, p in model.named_parameters() if key.endswith("_scale")]
        assert {g.shape[2] for g in gates} == {n} and sum(g.numel() for g in gates) / 1e6 == pytest.approx(
            millions, abs=0.05
        )


def test_the_head_is_most_of_a_small_image_and_attention_saves_little_there():
    config = preset("lina_d48w1536")
    linear = image_macs(config, 64, 25, guidance=True)
    softmax = image_macs(config, 64, 25, guidance=True, softmax=True)
    assert linear["head"] == softmax["head"] and 0.9 < sum(linear.values()) / sum(softmax.values()) < 1


# ---- the trunk
def test_the_trunk_sees_visible_tokens_only():
    model, x = tiny(), torch.randn(2, 16, 4, dtype=torch.float64)
    visible = torch.tensor([[3, 7], [0, 15]])
    z = model(x, (torch.tensor([0, 1]),), visible)
    other = x.clone()
    other[0, 5] += 1
    torch.testing.assert_close(model(other, (torch.tensor([0, 1]),), visible), z, rtol=0, atol=0)
    other[0, 7] += 1
    assert (model(other, (torch.tensor([0, 1]),), visible)[0] - z[0]).abs().max() > 1e-3


def test_the_order_of_the_list_and_what_fills_it_up_mean_nothing():
    model, x, labels = tiny(), torch.randn(1, 16, 4, dtype=torch.float64), (torch.tensor([2]),)
    z = model(x, labels, torch.tensor([[3, 7, 9]]))
    torch.testing.assert_close(model(x, labels, torch.tensor([[9, 3, 7]])), z, rtol=0, atol=1e-10)
    valid = torch.tensor([[True, False, True, True, False]])
    filled = model(x, labels, torch.tensor([[7, 3, 3, 9, 0]]), valid)
    torch.testing.assert_close(filled, z, rtol=0, atol=1e-5)


def test_labels_change_everything_and_images_become_tokens_and_back():
    model, x = tiny(), torch.randn(1, 16, 4, dtype=torch.float64)
    none = torch.zeros(1, 0, dtype=torch.int64)
    a, b = (model(x, (torch.tensor([label]),), none) for label in (0, 4))
    assert (a - b).abs().max() > 1e-3
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(model.unpatchify(model.patchify(image)), image)


@pytest.mark.parametrize(
    "changes",
    [{"kv_gate": "raw"}, {"kv_gate": "data"}, {"kv_gate": None}, {"per_head": False}, {"conv": False}, {"video": True}, {"normalisation": "subtraction"}],
    ids=lambda c: "-".join(f"{k}-{v}" for k, v in c.items()),
)  # fmt: skip
def test_every_variant_runs_and_learns(changes):
    model = tiny(**changes)
    out = model(torch.randn(2, 16, 4, dtype=torch.float64), (torch.tensor([0, 1]),), torch.tensor([[1, 2], [3, 4]]))
    out.square().sum().backward()
    silent = {"head.", "condition.norm", "connector.time", "connector.patch_embed"}
    for name, p in model.named_parameters():
        assert name.startswith(tuple(silent)) or p.grad.abs().sum() > 0, name


def test_text_states_are_filled_up_by_the_table():
    text = LinaConfig(
        side=8, channels=4, patch=2, dim=32, heads=2, connector_depth=1, encoder_depth=1, decoder_depth=1, head_depth=1,
        num_classes=None, text_dim=12, text_tokens=6, text_table=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LinaModel(text)
    states = torch.randn(2, 4, 12)
    words = torch.tensor([[True, True, False, False], [True, True, True, True]])
    tokens = model.condition(states, words)
    assert tokens.shape == (2, 6, 32)
    torch.testing.assert_close(tokens[0, 2:], model.condition(model.condition.null(1, "cpu"))[0, 2:])
    short = model.condition(states[:1, :2])
    torch.testing.assert_close(short[0], tokens[0])
    images = generate(model, (states, words), Sampling(2, 2, 3.0), generators(0, 1))
    assert images.shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="at most 6 positions"):
        model.condition(torch.randn(1, 7, 12))


# ---- generation
@pytest.mark.parametrize("tokens", [16, 64, 256])
@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_a_schedule_makes_every_token_once(tokens, steps):
    counts = counts_of_steps(tokens, steps)
    assert sum(counts) == tokens and min(counts) > 0 and len(counts) <= steps


def test_the_schedule_of_the_paper_begins_with_few():
    counts = counts_of_steps(256, 64)
    assert len(counts) <= 64 and counts[0] <= counts[-1]


def test_a_sample_depends_on_its_seed_and_not_on_its_batch():
    model = tiny()
    both = draw(model, [0, 1], [5, 6], guidance_scale=2.0)
    torch.testing.assert_close(draw(model, [1], [6], guidance_scale=2.0)[0], both[1], rtol=0, atol=1e-6)
    assert torch.equal(draw(model, [0, 1], [5, 6], guidance_scale=2.0), both)
    assert (draw(model, [0], [6])[0] - draw(model, [0], [5])[0]).abs().max() > 1e-3


def test_guidance_of_one_is_none_and_more_of_it_is_not():
    model = tiny()
    assert Sampling(4, guidance_scale=1.0).guidance(4) == [1.0] * 4
    plain, calls = draw(model, [0], [1]), []
    hook = model.decoder[0].register_forward_hook(lambda m, a, out: calls.append(len(out)))
    draw(model, [0], [1], guidance_scale=1.0, min_guidance_scale=None)
    assert set(calls) == {1}
    assert (draw(model, [0], [1], guidance_scale=3.0) - plain).abs().max() > 1e-4 and calls[-1] == 2
    hook.remove()
    assert Sampling(4, guidance_scale=3.0).guidance(4) == [1.5, 2.0, 2.5, 3.0]
    assert Sampling(4, guidance_scale=3.0, min_guidance_scale=None).guidance(4) == [3.0] * 4


def test_more_steps_than_tokens_are_clipped_with_a_warning():
    seen = []
    with pytest.warns(UserWarning, match="40 steps were asked for and an image has 16 tokens"):
        generate(tiny(), (torch.tensor([0]),), Sampling(40, 1), generators(0), lambda i, x: seen.append(i))
    assert seen == list(range(len(counts_of_steps(16, 16))))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_diffusion_steps": 0}, "diffusion steps is 0"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"min_guidance_scale": 0.0}, "at least 1"),
        ({"shift": 0.0}, "shift is 0.0"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_settings_that_do_not_fit_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**{"num_inference_steps": 4, **given})


def test_conditions_that_do_not_fit_are_refused():
    for labels, count, said in (
        ([5], 1, "from 0 to 4"),
        ([-1], 1, "from 0 to 4"),
        ([0, 1], 1, "one generator a sample"),
    ):
        with pytest.raises(ValueError, match=said):
            generate(tiny(), (torch.tensor(labels),), Sampling(2), generators(*range(count)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 3}, "divisible by heads"), ({"dim": 30, "heads": 2}, "by 4"), ({"side": 10}, "multiple of 4"),
        ({"num_classes": None}, "either num_classes or text_dim"), ({"normalisation": "x"}, "no normalisation"), ({"kv_gate": "x"}, "no kv_gate"),
    ],
    ids=["heads", "positions", "grid", "condition", "normalisation", "gate"],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match="choose one of"):
        preset("lina_big")


def test_noise_levels_go_from_one_to_zero():
    assert noise_levels(1) == [1.0, 0.0] and noise_levels(25)[-2] == pytest.approx(1e-3)
    shifted = noise_levels(25, 3.0)
    assert shifted == sorted(shifted, reverse=True) and all(
        a >= b for a, b in zip(shifted, noise_levels(25), strict=True)
    )


def test_the_exact_velocity_of_one_point_leads_to_it():
    target = torch.tensor([0.3, -1.2, 2.0])

    class Exact(torch.nn.Module):
        def condition(self, z):
            return z

        def forward(self, x, sigma, condition):
            return (x - target) / sigma

    found = denoise(Exact(), torch.zeros(5, 1), torch.randn(5, 3), 25)
    torch.testing.assert_close(found, target.expand(5, 3), rtol=0, atol=1e-4)


def test_a_head_learns_a_point():
    torch.manual_seed(0)
    model = LinaModel(TINY)
    head, target = model.head, torch.tensor([0.5, -0.5, 1.0, 0.0])
    optimizer, z = torch.optim.AdamW(head.parameters(), 5e-3), torch.ones(64, 32)
    for _ in range(150):
        noise, sigma = torch.randn(64, 4), torch.sigmoid(torch.randn(64))
        x = sigma[:, None] * noise + (1 - sigma[:, None]) * target
        loss = (head(x, sigma, head.condition(z)) - (noise - target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = denoise(head, z[:8], torch.randn(8, 4), 25)
    assert isinstance(head, FlowHead) and (found - target).abs().mean() < 0.1


# ---- learning
def test_one_image_is_learnt_by_heart():
    torch.manual_seed(0)
    model, image = LinaModel(TINY), torch.rand(1, 1, 8, 8) * 2 - 1
    target = model.patchify(image).expand(16, -1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.95))
    for _ in range(200):
        visible = torch.rand(16, 16).argsort(1)[:, :6]
        valid = torch.arange(6) < torch.randint(0, 7, (16, 1))
        z = model(target, (torch.zeros(16, dtype=torch.int64),), visible, valid)
        noise, sigma = torch.randn_like(target), torch.sigmoid(torch.randn(16, 16))
        x = sigma[..., None] * noise + (1 - sigma[..., None]) * target
        loss = (model.head(x, sigma, model.head.condition(z)) - (noise - target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = generate(model.eval(), (torch.tensor([0, 0]),), Sampling(4), generators(0, 1))
    assert math.sqrt((found - image).square().mean()) < 0.2 < image.std()
