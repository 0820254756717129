"""Laws of `WorldPipeline`, on an untrained tiny model; the shipped weights are tested in test_shipped.py."""

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler

from foveal.pipelines.errors import UserError
from foveal.pipelines.world.flow import sample, seeded_noise, sigma_schedule, to_frames, to_latents
from foveal.pipelines.world.models import MODELS, build_transformer
from foveal.pipelines.world.pipeline import WorldPipeline
from foveal.pipelines.world.text import TextTable
from foveal.pipelines.world.vocabulary import attributes_of, parse, word_ids

SPEC = dataclasses.replace(MODELS["tiny"], shift=8.0, steps=4)
PROMPTS = [
    "a small red circle moving up-left on a navy striped background",
    "a large white ring standing still on a black plain background",
]
CLIP = (3, SPEC.frames, SPEC.size, SPEC.size)


@pytest.fixture
def pipe() -> WorldPipeline:
    torch.manual_seed(0)
    transformer = build_transformer(SPEC.transformer, "stock").eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SPEC.shift)
    made = WorldPipeline(transformer, TextTable(64).eval(), scheduler, SPEC.frames, SPEC.size, SPEC.steps)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 16, 50])
def test_noise_levels_follow_the_formula(pipe, steps):
    pipe._set_schedule(steps, torch.device("cpu"))
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    expected = 8 * t / (1 + 7 * t)
    torch.testing.assert_close(pipe.scheduler.sigmas, expected.float(), atol=0, rtol=3e-7)
    if steps & (steps - 1) == 0:
        assert torch.equal(pipe.scheduler.sigmas, expected.float())
    assert sigma_schedule(steps, 8) == pytest.approx(expected.tolist(), abs=1e-15)
    torch.testing.assert_close(pipe.scheduler.timesteps, 1000 * expected[:-1].float())


def test_every_trained_size_has_its_own_shift(pipe):
    two = WorldPipeline(pipe.transformer, pipe.text, pipe.scheduler, 4, 24, 4, shifts={"16": 6.0, "24": 8.0})
    two.set_progress_bar_config(disable=True)
    seen = {}
    for size in (16, 24, 20):
        two(
            PROMPTS[:1],
            [0],
            size=size,
            callback_on_step_end=lambda p, i, t, f, at=size: seen.setdefault(at, []).append(f),
        )
    for size, shift in ((16, 6.0), (24, 8.0), (20, SPEC.shift)):
        assert [facts["sigma"] for facts in seen[size]] == pytest.approx(sigma_schedule(4, shift)[:-1], abs=1e-6)
    before = seen[16][2]["latents_before"]
    torch.testing.assert_close(two.velocity(before, PROMPTS[:1], 2), seen[16][2]["velocity"])


PAIR = PROMPTS[0].replace(" on a", " and a large blue ring moving down on a")


def test_two_objects_are_for_models_that_know_them(pipe):
    with pytest.raises(UserError, match="names two objects, but this model was trained on one"):
        pipe([PAIR], [0])
    with pytest.raises(UserError, match="names two objects"):
        pipe.velocity(torch.zeros(1, *CLIP), [PAIR], 0)
    two = WorldPipeline(pipe.transformer, pipe.text, pipe.scheduler, SPEC.frames, SPEC.size, 1, objects=2)
    two.set_progress_bar_config(disable=True)
    frames = two([PAIR, PROMPTS[0]], [0, 0]).frames
    assert not torch.equal(frames[0], frames[1])


def test_frames_are_documented(pipe):
    out = pipe(PROMPTS, [0, 1])
    assert out.frames.shape == (2, SPEC.frames, 3, SPEC.size, SPEC.size) and out.frames.dtype == torch.float32
    assert out.frames.min() >= 0 and out.frames.max() <= 1
    assert torch.equal(out.frames, to_frames(out.latents)) and out.latents.shape == (2, *CLIP)
    torch.testing.assert_close(to_latents(out.frames), out.latents.clamp(-1, 1))
    assert torch.equal(pipe(PROMPTS, [0, 1], output_type="latent").frames, out.latents)
    assert (pipe(PROMPTS, [0, 1], output_type="np").frames == out.frames.numpy()).all()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pipeline_equals_the_plain_sampler(pipe, guidance):
    out = pipe(PROMPTS, [3, 4], guidance=guidance)
    ids = word_ids(attributes_of([parse(prompt) for prompt in PROMPTS]))
    noise = seeded_noise([3, 4], *CLIP)
    options = {"steps": SPEC.steps, "shift": SPEC.shift, "guidance": guidance}
    torch.testing.assert_close(
        sample(pipe.transformer, pipe.text, ids, noise, **options), out.frames, atol=1e-5, rtol=0
    )


def test_a_batch_equals_its_samples_one_by_one(pipe):
    both = pipe(PROMPTS, [5, 6]).latents
    alone = torch.cat([pipe([prompt], [seed]).latents for prompt, seed in zip(PROMPTS, [5, 6], strict=True)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)
    assert torch.equal(seeded_noise([5, 6], *CLIP)[1], seeded_noise([6], *CLIP)[0])


def test_same_call_same_bits(pipe):
    assert torch.equal(pipe(PROMPTS, [0, 1]).latents, pipe(PROMPTS, [0, 1]).latents)


def test_given_latents_replace_the_seeds_noise(pipe):
    noise = seeded_noise([7], *CLIP)
    assert torch.equal(pipe(PROMPTS[:1], [0], latents=noise).latents, pipe(PROMPTS[:1], [7]).latents)


def test_branches_are_announced_like_in_diffusers(pipe, monkeypatch):
    seen, real = [], pipe.transformer.cache_context

    def spy(name, **place):
        seen.append((name, place["step_index"], place["num_inference_steps"], place["sigma"]))
        return real(name, **place)

    monkeypatch.setattr(pipe.transformer, "cache_context", spy)
    pipe(PROMPTS[:1], [0], steps=2, guidance=2.0)
    sigma = pytest.approx(8 * 0.5 / 4.5)
    assert seen == [("cond", 0, 2, 1.0), ("uncond", 0, 2, 1.0), ("cond", 1, 2, sigma), ("uncond", 1, 2, sigma)]
    seen.clear()
    pipe(PROMPTS[:1], [0], steps=1, guidance=1.0)
    assert [name for name, *_ in seen] == ["cond"]


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_callback_gives_what_teacher_forcing_needs(pipe, guidance):
    steps = []
    out = pipe(
        PROMPTS, [0, 1], guidance=guidance, callback_on_step_end=lambda p, i, t, facts: steps.append((i, t, facts))
    )
    assert [i for i, *_ in steps] == list(range(SPEC.steps))
    assert torch.equal(steps[0][2]["latents_before"], seeded_noise([0, 1], *CLIP))
    assert torch.equal(steps[-1][2]["latents"], out.latents)
    for i, t, facts in steps:
        change = (facts["sigma_next"] - facts["sigma"]) * facts["velocity"]
        torch.testing.assert_close(facts["latents_before"] + change, facts["latents"])
        assert facts["step_index"] == i and float(t) == pytest.approx(1000 * facts["sigma"])
        again = pipe.velocity(facts["latents_before"], PROMPTS, i, guidance=guidance)
        torch.testing.assert_close(again, facts["velocity"])
        assert torch.equal(facts["prompt_embeds"], pipe.text.encode(PROMPTS))


def test_callback_may_replace_latents(pipe):
    out = pipe(PROMPTS, [0, 1], callback_on_step_end=lambda p, i, t, facts: {"latents": torch.zeros(2, *CLIP)})
    assert (out.frames == 0.5).all()


def test_hooks_are_freed_at_the_end_and_the_timestep_is_cleared(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: calls.append(pipe.current_timestep))
    pipe(PROMPTS, [0, 1])
    assert calls == [None]


def test_other_clips_than_the_trained_one_can_be_asked_for(pipe):
    assert pipe(PROMPTS[:1], [0], frames=2, size=24).frames.shape == (1, 2, 3, 24, 24)


def test_progress_bar_is_on_unless_turned_off(pipe, capsys):
    pipe(PROMPTS[:1], [0])
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(PROMPTS[:1], [0])
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"prompts": ["a huge red circle"]}, "unknown word 'huge'"),
        ({"prompts": PROMPTS}, "2 prompts and 1 seeds"),
        ({"prompts": PROMPTS[0]}, "prompts is one string"),
        ({"prompts": [], "seeds": []}, "0 prompts and 0 seeds"),
        ({"seeds": 3}, "one seed a prompt"),
        ({"seeds": [-1]}, "seed -1 is not usable"),
        ({"seeds": [0.5]}, "seed 0.5 is not usable"),
        ({"steps": 0}, "steps is 0: use a whole number of at least 1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"latents": torch.zeros(1, 3, 4, 8, 8)}, r"latents have shape \(1, 3, 4, 8, 8\), but \(1, 3, 4, 16, 16\)"),
        ({"size": 18}, "18 px does not fit patches"),
        ({"frames": 400}, "at most 128 frames"),
        ({"output_type": "gif"}, "output_type 'gif' is unknown"),
    ],
)
def test_wrong_calls_get_one_sentence(pipe, call, said):
    with pytest.raises(UserError, match=said) as refusal:
        pipe(**{"prompts": PROMPTS[:1], "seeds": [0], **call})
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")


def test_velocity_refuses_steps_outside_the_path(pipe):
    with pytest.raises(UserError, match="step 4 is outside a path of 4 steps"):
        pipe.velocity(torch.zeros(1, *CLIP), PROMPTS[:1], 4)
    with pytest.raises(UserError, match="do not fit 2 prompts"):
        pipe.velocity(torch.zeros(1, *CLIP), PROMPTS, 0)
