"""Sites are right: grid, spans, text lengths, layers, steps, branches. A call that cannot be placed runs dense, named."""

import dataclasses

import pytest
import torch
import zoo
from fakes import Masked, Spy
from tiny import (
    GRID,
    MODELS,
    flux_inputs,
    flux_transformer,
    hunyuan_inputs,
    hunyuan_transformer,
    image_ids,
    run,
)

from foveal.plugins.accelerate import accelerate
from foveal.plugins.diffusers_host.grid import ids_layout
from foveal.plugins.site import Span


def spied(model, inputs, **knobs):
    spy = Spy(**knobs)
    handle = accelerate(model, spy)
    run(model, inputs)
    return spy, handle


def reasons(handle):
    return {item["reason"]: item["count"] for item in handle.record.ran_dense_why()}


@pytest.mark.parametrize(
    ("name", "grid", "visual", "text"),
    [
        ("wan", GRID, Span(0, 72), None),
        ("flux", (1, 4, 6), Span(5, 29), Span(0, 5)),
        ("hunyuan", GRID, Span(0, 72), Span(72, 80)),
    ],
)
def test_grid_and_spans(name, grid, visual, text):
    model, inputs = zoo.build(name)
    spy, _ = spied(model, inputs)
    names = [site.name for site, _ in spy.seen]
    for i, (site, v) in enumerate(spy.seen):
        assert (site.grid, site.visual, site.text, site.tokens) == (grid, visual, text, v.shape[2])
        assert (site.layer, site.layers, int(site.layer_id)) == (i, len(spy.seen), i)
        assert not site.ordered and site.extra == ()
    assert len(set(names)) == len(names)


@pytest.mark.filterwarnings("ignore")
def test_unets_have_one_grid_per_level():
    model, inputs = zoo.build("sd_unet")
    spy, _ = spied(model, inputs)
    assert {site.grid for site, _ in spy.seen} == {(1, 16, 24), (1, 8, 12)}
    model, inputs = zoo.build("motion_unet")
    spy = Spy()
    accelerate(model, spy, roles=["self", "temporal"])
    run(model, inputs)
    assert {(site.role, site.grid) for site, _ in spy.seen} >= {("temporal", (4, 1, 1)), ("self", (1, 8, 12))}


def values_of_first_layer(model, inputs, visual_module, project):
    """v [B, H, N, D] at the first bound layer, and what the visual stream alone projects to."""
    caught = {}
    hook = visual_module.register_forward_pre_hook(
        lambda m, a, k: caught.update(x=k.get("hidden_states", a[0] if a else None)), with_kwargs=True
    )
    spy, _ = spied(model, inputs)
    hook.remove()
    site, v = spy.seen[0]
    with torch.no_grad():
        return site, v.transpose(1, 2).flatten(2), project(caught["x"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_visual_rows_of_v_are_the_visual_stream(name):
    model, inputs = zoo.build(name)
    attn = model.blocks[0].attn1 if name == "wan" else model.transformer_blocks[0].attn
    site, v, visual = values_of_first_layer(model, inputs, attn, attn.to_v)
    torch.testing.assert_close(v[:, site.visual.start : site.visual.stop], visual)
    if site.text is not None:
        assert not torch.allclose(v[:, site.text.start : site.text.stop][:, :5], visual[:, :5])


def test_tokens_are_row_major():
    """One latent pixel moves exactly the token at (t, h, w) in the first layer."""
    t, h, w = GRID
    for name, embed in (("wan", "patch_embedding"), ("hunyuan", "x_embedder")):
        model, inputs = zoo.build(name)
        base = spied(model, inputs)[0].seen[0][1]
        inputs["hidden_states"] = inputs["hidden_states"].clone()
        inputs["hidden_states"][:, :, 2, 2 * 1, 2 * 5] += 10
        moved = (spied(model, inputs)[0].seen[0][1] - base).abs().sum((0, 1, 3))[: t * h * w]
        assert getattr(model, embed) is not None
        assert moved.argmax() == 2 * h * w + 1 * w + 5
        assert int((moved > 1e-6).sum()) == 1


def test_text_lengths_are_per_sample_and_on_the_device():
    model, inputs = hunyuan_transformer(), hunyuan_inputs(batch=3)
    spy, _ = spied(model, inputs)
    valid = spy.seen[0][0].valid_text
    assert valid.dtype == torch.int32 and valid.tolist() == [5, 7, 8]
    assert all(site.valid_text is valid for site, _ in spy.seen)


def test_masked_method_equals_each_prompt_alone_without_padding():
    model, both = hunyuan_transformer(), hunyuan_inputs(batch=2, valid=(3, 7))
    accelerate(model, Masked())
    whole = run(model, both)
    for i, n in enumerate((3, 7)):
        alone = {k: v[i : i + 1] for k, v in both.items()}
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :n]
        alone["encoder_attention_mask"] = torch.ones(1, n)
        torch.testing.assert_close(run(model, alone), whole[i : i + 1], atol=2e-6, rtol=1e-5)


# ---- references and padding are global tokens
def test_references_are_seen_by_all_and_see_all():
    model, inputs = zoo.build("kontext")
    spy, _ = spied(model, inputs)
    site = spy.seen[0][0]
    assert (site.visual, site.extra) == (Span(5, 29), (Span(29, 35),))
    handle = accelerate(model, Masked(shuffle=True))
    run(model, inputs)
    assert reasons(handle) == {}
    assert not handle.record.notes, "they keep their places behind the grid, so tokens are put in order once"


# ---- what cannot be placed runs dense
@pytest.mark.parametrize("change", ["shuffled", "hole", "reference first", "none generated"])
def test_odd_image_ids_run_dense(change):
    model, inputs = flux_transformer(), flux_inputs()
    ids = inputs["img_ids"].clone()
    if change == "shuffled":
        ids = ids[torch.randperm(len(ids))]
    elif change == "hole":
        ids[3, 2] = 9
    elif change == "reference first":
        ids[0, 0] = 1
    else:
        ids[:, 0] = 1
    inputs["img_ids"] = ids
    plain = run(model, inputs)
    handle = accelerate(model, Masked())
    assert torch.equal(run(model, inputs), plain)
    assert list(reasons(handle).values()) == [4]


def test_ids_that_do_not_fit_the_sequence_run_dense():
    layout = ids_layout(image_ids(4, 6), 5)
    assert (layout.grid, layout.text, layout.extra) == ((1, 4, 6), 5, 0)
    model, inputs = flux_transformer(), flux_inputs()
    handle = accelerate(model, Masked(shuffle=True))
    frame = model.__dict__["_foveal"].frame
    run(model, inputs)
    frame.layout, frame.ordered = dataclasses.replace(layout, grid=(1, 5, 6)), False
    layer = model.transformer_blocks[0].attn.processor.layer
    from foveal.plugins.diffusers_host.layer import Core

    assert layer.place(Core(*[torch.zeros(1, 29, 2, 16)] * 3)) == "the sequence does not fit the token grid"
    assert handle.is_active()


def test_equal_shapes_at_a_recycled_address_are_not_the_old_grid():
    model = flux_transformer()
    spy = Spy()
    accelerate(model, spy)
    for h, w in ((4, 6), (6, 4), (3, 8), (8, 3)):
        run(model, flux_inputs(grid=(1, h, w)))
        assert spy.seen[-1][0].grid == (1, h, w)


def test_ids_changed_in_place_are_read_again():
    model, inputs = flux_transformer(), flux_inputs(grid=(1, 4, 6))
    spy = Spy()
    accelerate(model, spy)
    run(model, inputs)
    inputs["img_ids"].copy_(image_ids(6, 4))
    run(model, inputs)
    assert (spy.seen[0][0].grid, spy.seen[-1][0].grid) == ((1, 4, 6), (1, 6, 4))


@pytest.mark.filterwarnings("ignore")
def test_masks_beyond_text_padding_run_dense_by_name():
    reason = "an attention mask beyond padding of the text"
    model, inputs = zoo.build("qwen")
    inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0]])
    plain = run(model, inputs)
    handle = accelerate(model, Masked())
    assert torch.equal(run(model, inputs), plain)
    assert reasons(handle) == {reason: 2}
    assert f"dense, {reason}: 2 calls" in str(handle.summary())


def test_masks_are_read_once_per_prompt_and_again_when_they_change():
    model, inputs = zoo.build("qwen")
    spy, mask = Spy(), inputs["encoder_hidden_states_mask"]
    accelerate(model, spy)
    run(model, inputs)
    run(model, inputs)
    first, again = spy.seen[0][0].valid_text, spy.seen[-1][0].valid_text
    assert first is again and first.tolist() == [6]
    mask[:, 3:] = 0
    run(model, inputs)
    assert spy.seen[-1][0].valid_text.tolist() == [3]
