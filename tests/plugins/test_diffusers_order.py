"""Tokens and RoPE permuted once per model call: nothing but the order changes.

Permuting changes which sums float rounding sees, so equality is to 1e-5 of a unit-sized output, not to the bit.
"""

import inspect

import diffusers as D
import pytest
import test_hosts_relatives as relatives
import torch
import zoo
from fakes import Masked, Spy, shuffled_order
from tiny import (
    MODELS,
    PIPES,
    flux_inputs,
    flux_transformer,
    hunyuan_inputs,
    hunyuan_transformer,
    noise,
    run,
    wan_inputs,
    wan_transformer,
)

from foveal.plugins.accelerate import accelerate
from foveal.plugins.diffusers_host.order_checks import stands_aside
from foveal.plugins.diffusers_host.order_recipes import NO_PLACE, PLACED, RECIPES
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.running import NOTHING_LEFT_OUT

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GRIDS = {"wan": [(3, 4, 6), (1, 5, 7)], "flux": [(1, 4, 6), (1, 45, 53)], "hunyuan": [(3, 4, 6), (2, 3, 5)]}
CASES = [(name, grid) for name, grids in GRIDS.items() for grid in grids]


@pytest.mark.parametrize(("name", "grid"), CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_shuffled_dense_equals_the_plain_model(name, grid, batch):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs(batch, grid)
    plain, spy = run(model, inputs), Spy(shuffle=True)
    accelerate(model, spy)
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    assert all(site.ordered for site, _ in spy.seen)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_visual_tokens_really_are_in_order_at_the_call(name):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs(1)
    spy = Spy(shuffle=True)
    handle = accelerate(model, spy)
    run(model, inputs)
    handle.order_hook = False
    run(model, inputs)
    half = len(spy.seen) // 2
    (site, v), (unordered, v_plain) = spy.seen[0], spy.seen[half]
    assert site.ordered and not unordered.ordered
    at = slice(site.visual.start, site.visual.stop)
    torch.testing.assert_close(v[:, :, at], v_plain[:, :, at][:, :, shuffled_order(site.grid).token], **TOLERANCE)
    if site.text is not None:
        text = slice(site.text.start, site.text.stop)
        torch.testing.assert_close(v[:, :, text], v_plain[:, :, text], **TOLERANCE)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("method", [Masked(shuffle=True), GRAT(group=(1, 2, 4), b=(1, 1, 0))], ids=["masked", "grat"])
def test_hook_on_and_off_give_the_same(name, method):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs(2)
    plain = run(model, inputs)
    handle = accelerate(model, method)
    on = run(model, inputs)
    handle.order_hook = False
    torch.testing.assert_close(run(model, inputs), on, **TOLERANCE)
    assert (on - plain).abs().max() > 1e-3, "the method must matter for this test to mean something"


def test_per_token_timesteps_are_permuted_with_the_tokens():
    model, inputs = wan_transformer(), wan_inputs(2)
    inputs["timestep"] = torch.randint(0, 1000, (2, 72), generator=torch.Generator().manual_seed(3))
    plain, spy = run(model, inputs), Spy(shuffle=True)
    accelerate(model, spy)
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    assert spy.seen[0][0].ordered


def test_changing_grids_change_the_order():
    model = wan_transformer()
    grids = ((3, 4, 6), (2, 6, 6), (3, 4, 6))
    plain = [run(model, wan_inputs(grid=g)) for g in grids]
    accelerate(model, Spy(shuffle=True))
    for grid, expected in zip(grids, plain, strict=True):
        torch.testing.assert_close(run(model, wan_inputs(grid=grid)), expected, **TOLERANCE)


def aside(model, inputs, method=None):
    """Run with a shuffled masked method; -> (difference to the plan-carried order, notes)."""
    method = method or Masked(shuffle=True)
    handle = accelerate(model, method)
    out = run(model, inputs)
    handle.order_hook = False
    notes = list(handle.record.notes)
    return (run(model, inputs) - out).abs().max().item(), notes


def test_controlnet_residuals_make_the_hook_stand_aside():
    model, inputs = flux_transformer(), flux_inputs()
    inputs["controlnet_block_samples"] = [noise(1, 24, 32, seed=5)]
    difference, (note,) = aside(model, inputs)
    assert difference == 0 and "ControlNet adds residuals" in note


def test_unknown_attention_arguments_make_the_hook_stand_aside():
    model = flux_transformer()
    handle = accelerate(model, Spy(shuffle=True))
    run(model, flux_inputs())
    layout, recipe = model.__dict__["_foveal"].frame.layout, RECIPES["FluxTransformer2DModel"]
    call = {**flux_inputs(), "joint_attention_kwargs": {"scale": 1.0}}
    assert stands_aside(model, recipe, call, layout) is None
    call["joint_attention_kwargs"] = {"ip_adapter_masks": None}
    assert "ip_adapter_masks" in stands_aside(model, recipe, call, layout)
    assert handle.is_active()


def test_replaced_first_frames_make_the_hook_stand_aside():
    model = hunyuan_transformer(image_condition_type="token_replace")
    difference, (note,) = aside(model, hunyuan_inputs())
    assert difference == 0 and "first frame" in note


def test_subclasses_are_not_trusted():
    model = wan_transformer()
    model.__class__ = type("WanTransformer3DModelPlus", (type(model),), {})
    difference, (note,) = aside(model, wan_inputs())
    assert difference == 0 and "no place to permute" in note


def test_rope_and_embedding_outside_a_model_call_are_untouched():
    model, inputs = wan_transformer(), wan_inputs()
    x = inputs["hidden_states"]
    rope, embedded = model.rope(x), model.patch_embedding(x)
    accelerate(model, Spy(shuffle=True))
    run(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(model.rope(x), rope, strict=True))
    assert torch.equal(model.patch_embedding(x), embedded)


@pytest.mark.parametrize("name", sorted(PIPES))
def test_full_window_is_the_plain_pipeline(name):
    make, call = PIPES[name]
    pipe = make()
    plain = call(pipe)
    with accelerate(pipe, "grat", group=(1, 2, 3), b=-1) as handle:
        torch.testing.assert_close(call(pipe), plain, atol=1e-4, rtol=1e-4)
        assert handle.record.density() == pytest.approx(1.0) or name == "hunyuan"
        assert {row["reason"] for row in handle.record.ran_dense_why()} <= {NOTHING_LEFT_OUT}
    assert torch.equal(call(pipe), plain)


def test_a_controlnet_says_why_not():
    sizes = {k: v for k, v in relatives.FLUX.items()}
    model = D.FluxControlNetModel(**sizes, pooled_projection_dim=32).eval()
    inputs = {**flux_inputs(), "controlnet_cond": noise(1, 24, 16, seed=7)}
    for block in (*model.controlnet_blocks, *model.controlnet_single_blocks):
        torch.nn.init.normal_(block.weight, generator=torch.Generator().manual_seed(0))
    difference, (note,) = aside(model, inputs)
    assert difference == 0 and note.endswith(f"because {PLACED['FluxControlNetModel']}.") and NO_PLACE not in note


def _masked(model, inputs):
    n = inputs["hidden_states"].shape[-2] * inputs["hidden_states"].shape[-1]
    inputs["attention_mask"] = torch.ones(inputs["hidden_states"].shape[0], n // model.config.patch_size**2)


def _residuals(model, inputs):
    inputs["block_controlnet_hidden_states"] = [torch.zeros(1)]


def _short_control(model, inputs):
    inputs["control_hidden_states"] = inputs["control_hidden_states"][:, :, :1]


def _causal(model, inputs):
    model.register_to_config(num_frame_per_block=2)


def _frame_times(model, inputs):
    frames = inputs["hidden_states"].shape[2]
    inputs["timestep"] = torch.arange(frames).view(1, 1, frames, 1, 1)


def _keyframes(model, inputs):
    inputs["video_keyframes_mask"] = torch.ones(1, inputs["hidden_states"].shape[1], 1)


ASIDE = {
    "pixart": (_masked, "a mask names tokens by their place"),
    "sd3": (_residuals, "ControlNet adds residuals"),
    "wan_vace": (_short_control, "the control video has another size"),
    "skyreels": (_causal, "frames see only earlier ones"),
    "cosmos": (_frame_times, "the model spreads timesteps per frame over its tokens where no module shows them"),
    "ltx2": (_keyframes, "a mask names tokens by their place"),
}


@pytest.mark.parametrize("name", ASIDE)
def test_what_names_tokens_by_their_place_makes_the_hook_stand_aside(name):
    change, reason = ASIDE[name]
    model, inputs = zoo.build(name)
    change(model, inputs)
    plain, spy = run(model, inputs), Spy(shuffle=True)
    handle = accelerate(model, spy)
    assert torch.equal(run(model, inputs), plain)
    assert [note for note in handle.record.notes if reason in note] and not any(s.ordered for s, _ in spy.seen)


def test_rotary_tables_that_the_caller_brings_are_his():
    model, inputs = zoo.build("cogvideox15")
    brought = inputs["image_rotary_emb"]
    before = [table.clone() for table in brought]
    plain, spy = run(model, inputs), Spy(shuffle=True)
    accelerate(model, spy)
    with torch.no_grad():  # by position too
        by_position = model(
            *(inputs.get(name) for name in list(inspect.signature(model.forward).parameters)[:6]), return_dict=False
        )
    torch.testing.assert_close(by_position[0], plain, **TOLERANCE)
    assert all(torch.equal(a, b) for a, b in zip(brought, before, strict=True)) and spy.seen[0][0].ordered
