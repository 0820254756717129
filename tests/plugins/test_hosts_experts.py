"""Two experts (Wan 2.2): one handle, one run, one count of steps, whichever transformer is at work."""

import diffusers as D
import numpy as np
import pytest
import torch
from fakes import Spy
from grid_oracle import group_mask, window_mask
from host_oracle import masked_attention, sequence_mask
from tiny import noise, t5_text, t5_tokenizer, wan_call, wan_pipe, wan_transformer, wan_vae
from transformers import UMT5Config, UMT5EncoderModel

from foveal.plugins.accelerate import accelerate, handle_of
from foveal.plugins.diffusers_host.processors import GRATAttnProcessor

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, FIRST = 4, 2  # the first expert takes this many of the steps
GRID = (3, 3, 4)  # of 9 frames of 48 x 64 pixels
SPARSE = {"grat": {"group": (1, 1, 2), "b": (1, 1, 0)}, "neighborhood": {"window": (1, 3, 3)}}
MASKS = {"grat": group_mask, "neighborhood": window_mask}


def boundary(scheduler, first=FIRST):
    """The boundary ratio that hands over after that many steps."""
    scheduler.set_timesteps(STEPS)
    high, low = (float(t) for t in scheduler.timesteps[first - 1 : first + 1])
    return (high + low) / 2 / scheduler.config.num_train_timesteps


def second_expert():
    """The same shape as the first, other weights."""
    model = wan_transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


def two_experts():
    pipe = wan_pipe()
    pipe.register_modules(transformer_2=second_expert())
    pipe.register_to_config(boundary_ratio=boundary(pipe.scheduler))
    return pipe


def image_pipe():
    """Wan 2.2 I2V has no image encoder; its pipeline names the branch, but no step."""
    scheduler = D.FlowMatchEulerDiscreteScheduler(shift=7.0)
    first, second = (wan_transformer(in_channels=36, out_channels=16) for _ in range(2))
    return D.WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(UMT5EncoderModel, UMT5Config), vae=wan_vae(), scheduler=scheduler,
        transformer=first, transformer_2=second, boundary_ratio=boundary(scheduler),
    )  # fmt: skip


def image_call(pipe, steps=STEPS):
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": 16, "output_type": "pt"}
    picture, generator = noise(1, 3, 48, 64).sigmoid(), torch.Generator().manual_seed(0)
    return pipe(picture, "a cat", "red", num_inference_steps=steps, generator=generator, **size).frames


PIPELINES = {"text to video": (two_experts, wan_call), "image to video": (image_pipe, image_call)}


def experts_at(spy, pipe):
    """(component, step, steps, branch) of every model call that the spy saw, in order."""
    seen = {id(site.layer_id): site for site, _ in spy.seen}
    owner = {
        id(getattr(pipe, name).blocks[0].attn1.processor.layer.layer_id): name
        for name in ("transformer", "transformer_2")
    }
    assert set(owner) <= set(seen)
    first_layers = [site for site, _ in spy.seen if site.layer == 0]
    return [(owner[id(site.layer_id)], site.step, site.steps, site.branch) for site in first_layers]


def reasons(handle):
    return {item["reason"]: item for item in handle.record.ran_dense_why()}


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_are_those_of_the_run_in_both_experts(name):
    make, call = PIPELINES[name]
    pipe, spy = make(), Spy()
    accelerate(pipe, spy)
    expected = [
        ("transformer" if step < FIRST else "transformer_2", step, STEPS, branch)
        for step in range(STEPS)
        for branch in ("cond", "uncond")
    ]
    for run in (1, 2):
        call(pipe, steps=STEPS)
        assert experts_at(spy, pipe) == expected * run


def test_the_record_and_the_summary_hold_both_experts():
    pipe = two_experts()
    handle = accelerate(pipe, "grat", **SPARSE["grat"])
    wan_call(pipe, steps=STEPS)
    names = [f"{c}.blocks.{i}.attn1" for c in ("transformer", "transformer_2") for i in range(2)]
    assert handle.still_bound() == [row.qualified for row in handle.record.layers] == names
    calls = handle.record.by_layer_step()["calls"]
    assert calls.tolist() == [[2, 2, 0, 0]] * 2 + [[0, 0, 2, 2]] * 2
    assert (handle.record.transformer_by_step() > 0).tolist() == [True] * STEPS
    density = handle.record.by_layer_step()["density"]
    assert np.array_equal(np.isnan(density), calls == 0) and np.nanmax(density) < 1
    text = str(handle.summary())
    assert "in 4 of 4 layers" in text and [text.count(f"{name} ") for name in names] == [1] * 4


@pytest.mark.parametrize("dense", [3, 0.75], ids=["steps", "fraction"])
def test_dense_steps_count_from_the_start_of_the_run_not_of_the_expert(dense):
    pipe = two_experts()
    handle = accelerate(pipe, "grat", dense_steps=dense, **SPARSE["grat"])
    wan_call(pipe, steps=STEPS)
    by_step = np.nanmax(handle.record.by_layer_step()["density"], axis=0)
    assert by_step[:3].tolist() == [1] * 3 and by_step[3] < 1
    ((_, why),) = reasons(handle).items()
    assert why["count"] == 3 * 2 * 2 and {name.split(".")[0] for name in why["layers"]} == {
        "transformer",
        "transformer_2",
    }
    assert str(handle.summary()).count(why["reason"]) == 1


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_sparse_experts_equal_the_masked_pipeline_and_remove_restores_both(method):
    pipe = two_experts()
    plain = wan_call(pipe, steps=STEPS)
    n = GRID[0] * GRID[1] * GRID[2]
    with masked_attention({n: sequence_mask(MASKS[method](GRID, **SPARSE[method]), n, 0)}) as seen:
        expected = wan_call(pipe, steps=STEPS)
    assert seen == {n} and not torch.allclose(expected, plain, atol=1e-4)
    handle = accelerate(pipe, method, **SPARSE[method])
    torch.testing.assert_close(wan_call(pipe, steps=STEPS), expected, atol=1e-4, rtol=1e-4)
    handle.remove()
    assert torch.equal(wan_call(pipe, steps=STEPS), plain)


def test_the_second_expert_matters_and_may_be_accelerated_alone():
    pipe = two_experts()
    plain = wan_call(pipe, steps=STEPS)
    with accelerate(pipe.transformer_2, "grat", **SPARSE["grat"]) as handle:
        assert not torch.equal(wan_call(pipe, steps=STEPS), plain)
        assert handle.record.by_layer_step()["calls"].tolist() == [[0, 0, 2, 2]] * 2
    assert torch.equal(wan_call(pipe, steps=STEPS), plain)


def test_set_attn_processor_enters_both_experts_under_one_handle():
    pipe = two_experts()
    pipe.set_attn_processor(GRATAttnProcessor(**SPARSE["grat"]))
    handle = handle_of(pipe)
    assert handle is handle_of(pipe.transformer) is handle_of(pipe.transformer_2)
    assert len(handle.still_bound()) == 4
    handle.remove()
    assert handle_of(pipe) is handle_of(pipe.transformer_2) is None


def test_states_of_both_experts_start_anew_with_every_run():
    pipe, spy = two_experts(), Spy()
    handle = accelerate(pipe, spy)
    wan_call(pipe, steps=STEPS)
    assert handle.state == {}
    pipe.scheduler.set_timesteps(STEPS)
    for model in (pipe.transformer, pipe.transformer_2):
        with model.cache_context("cond"), torch.no_grad():
            model(noise(1, 16, 3, 6, 8), torch.tensor([5]), noise(1, 12, 32))
    names = [f"{c}.blocks.{i}.attn1" for c in ("transformer", "transformer_2") for i in range(2)]
    assert list(handle.state) == [(name, "cond") for name in names]
    pipe.scheduler.set_timesteps(STEPS)
    assert handle.state == {}


def test_a_pipeline_with_the_second_expert_alone_has_its_steps():
    pipe, spy = two_experts(), Spy()
    pipe.register_modules(transformer=None)
    pipe.register_to_config(boundary_ratio=2.0)  # every step is the second expert's
    handle = accelerate(pipe, spy)
    wan_call(pipe, steps=2)
    assert [site.step for site, _ in spy.seen if site.layer == 0] == [0, 0, 1, 1]
    assert all(name.startswith("transformer_2.") for name in handle.still_bound())
