"""Whole pipelines: runs repeat, handles undo themselves, settings travel as JSON, set_attn_processor works both ways."""

import json

import diffusers
import pytest
import torch
from fakes import Masked, Spy
from tiny import PIPES, run, wan_call, wan_inputs, wan_pipe, wan_transformer

from foveal.plugins.accelerate import AccelerateError, accelerate, handle_of
from foveal.plugins.diffusers_host.handle import Handle
from foveal.plugins.diffusers_host.install import install, uninstall
from foveal.plugins.diffusers_host.processors import GRATAttnProcessor, NeighborhoodAttnProcessor, processor_class

GRAT_KNOBS = {"group": (1, 2, 2), "b": (1, 1, 0)}


@pytest.fixture
def installed():
    """Whatever a test does, diffusers knows our processors afterwards, as it does once they are imported."""
    install()
    yield
    install()


@pytest.mark.parametrize("name", sorted(PIPES))
def test_runs_repeat_and_remove_restores_every_bit(name):
    make, call = PIPES[name]
    pipe = make()
    plain, attributes = call(pipe), set(pipe.scheduler.__dict__)
    before = dict(pipe.transformer.attn_processors)
    handle = accelerate(pipe, "grat", **GRAT_KNOBS)
    first = call(pipe)
    assert torch.equal(call(pipe), first)
    assert not torch.equal(first, plain)
    handle.remove()
    assert all(pipe.transformer.attn_processors[k] is p for k, p in before.items())
    assert set(pipe.scheduler.__dict__) == attributes
    assert torch.equal(call(pipe), plain)


def test_dense_pipeline_is_bit_identical():
    for make, call in PIPES.values():
        pipe = make()
        plain = call(pipe)
        accelerate(pipe, "dense")
        assert torch.equal(call(pipe), plain)


def test_two_prompts_of_different_length_share_a_batch():
    make, call = PIPES["hunyuan"]
    pipe = make()
    accelerate(pipe, Masked())
    prompts = ["a cat", "a dog riding a red wave in the blue photo"]
    both = call(pipe, prompts, latents=torch.zeros(2, 4, 3, 6, 8))
    for prompt, together in zip(prompts, both, strict=True):
        alone = call(pipe, prompt, latents=torch.zeros(1, 4, 3, 6, 8))
        torch.testing.assert_close(alone[0], together, atol=2e-5, rtol=1e-4)


def test_both_experts_of_wan_are_entered():
    pipe = wan_pipe()
    pipe.transformer_2 = wan_transformer()
    pipe.register_to_config(boundary_ratio=0.875)
    handle = accelerate(pipe, Spy())
    components = {row.component for row in handle.record.layers}
    assert components == {"transformer", "transformer_2"}
    wan_call(pipe, steps=4)
    steps = {row.component: sorted(row.cells) for row in handle.record.layers}
    assert sorted(steps["transformer"] + steps["transformer_2"]) == [0, 1, 2, 3]
    assert handle_of(pipe.transformer_2) is handle
    single = accelerate(pipe.transformer_2, Spy())
    assert len(handle.still_bound()) == 2 and handle_of(pipe.transformer_2) is single
    handle.remove()
    assert single.is_active()


def test_a_second_model_that_cannot_be_entered_leaves_the_first_alone():
    pipe = wan_pipe()
    pipe.transformer_2 = wan_transformer(num_layers=1)
    with pytest.raises(AccelerateError, match="outside 0 to 0"):
        accelerate(pipe, Spy(), layers=[1])
    assert handle_of(pipe) is None and "set_timesteps" not in pipe.scheduler.__dict__


def test_pipelines_without_a_denoiser_are_refused():
    class Empty(diffusers.DiffusionPipeline):
        def __init__(self):
            super().__init__()

    with pytest.raises(AccelerateError, match="Empty has none of transformer, transformer_2, unet"):
        accelerate(Empty(), "dense")


def test_a_swapped_scheduler_is_followed():
    pipe, spy = wan_pipe(), Spy()
    accelerate(pipe, spy)
    wan_call(pipe, steps=2)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    wan_call(pipe, steps=3)
    assert [s.step for s, _ in spy.seen if s.layer == 0][4:] == [0, 0, 1, 1, 2, 2]


# ---- settings
def test_settings_round_trip_through_json():
    pipe = wan_pipe()
    handle = accelerate(pipe, "grat", layers=[0], dense_steps=0.5, **GRAT_KNOBS)
    sparse = wan_call(pipe)
    text = handle.to_json()
    assert json.loads(text) == json.loads(json.dumps(handle.settings))
    again = accelerate(pipe, **json.loads(text))
    assert again.method == handle.method and again.settings == handle.settings
    assert torch.equal(wan_call(pipe), sparse)
    assert Handle.from_settings(pipe, text).settings == handle.settings


def test_a_predicate_is_written_down_as_the_names_it_chose():
    handle = accelerate(wan_transformer(), "grat", layers=lambda name: "1" in name.split(".")[1])
    assert handle.settings["layers"] == ["blocks.1.attn1"]


# ---- set_attn_processor
def test_models_take_our_processors(installed):
    model, inputs = wan_transformer(), wan_inputs()
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    expected = run(model, inputs)
    handle.remove()
    model.set_attn_processor(GRATAttnProcessor(**GRAT_KNOBS))
    assert torch.equal(run(model, inputs), expected)
    assert handle_of(model).method == handle.method
    assert handle_of(model).still_bound() == ["blocks.0.attn1", "blocks.1.attn1"]


def test_pipelines_take_our_processors_and_diffusers_own(installed):
    pipe = wan_pipe()
    before = dict(pipe.transformer.attn_processors)
    plain = wan_call(pipe)
    pipe_processor = NeighborhoodAttnProcessor(window=(1, 3, 3), layers=[0])
    pipe.set_attn_processor(pipe_processor)
    assert handle_of(pipe).still_bound() == ["transformer.blocks.0.attn1"]
    assert not torch.equal(wan_call(pipe), plain)
    pipe.set_attn_processor(before)
    assert torch.equal(wan_call(pipe), plain)
    handle_of(pipe).remove()


def test_uninstall_gives_diffusers_its_methods_back(installed):
    mixin = diffusers.models.attention.AttentionMixin
    uninstall()
    original = mixin.set_attn_processor
    install()
    install()
    assert mixin.set_attn_processor is not original and hasattr(diffusers.DiffusionPipeline, "set_attn_processor")
    uninstall()
    assert mixin.set_attn_processor is original and not hasattr(diffusers.DiffusionPipeline, "set_attn_processor")


def test_templates_never_run_by_themselves(installed):
    template = processor_class(Masked)(reach=2)
    assert template.method == Masked(reach=2) and type(template).__name__ == "MaskedAttnProcessor"
    model = wan_transformer()
    model.blocks[0].attn1.set_processor(template)
    with pytest.raises(AccelerateError, match="MaskedAttnProcessor is a template"):
        run(model, wan_inputs())


def test_dicts_of_templates_are_refused(installed):
    model = wan_transformer()
    mixture = dict.fromkeys(model.attn_processors, GRATAttnProcessor())
    with pytest.raises(AccelerateError, match="choose layers with its layers="):
        model.set_attn_processor(mixture)
