"""Every class of diffusers that foveal accelerates: its tokens are permuted once per model call, or the reason is known.

Permuting changes which sums float rounding sees, so equality is to 1e-5 of a unit-sized output, not to the bit.
"""

import copy
import inspect
from pathlib import Path

import diffusers as D
import pytest
import test_hosts_relatives as relatives
import torch
import zoo
from fakes import Masked, Spy, shuffled_order
from tiny import MODELS, noise, run

from foveal.plugins.accelerate import accelerate
from foveal.plugins.diffusers_host.families import FAMILIES
from foveal.plugins.diffusers_host.grid import levels
from foveal.plugins.diffusers_host.order_recipes import LEVELS, PLACED, RECIPES
from foveal.plugins.diffusers_host.structure import parameters_of

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


# ---- every other model that has a recipe
def _stirred(model, inputs):
    """With positions that differ: those of these models are learned, and begin as zeros."""
    for name, parameter in model.named_parameters():
        if name.startswith(("pos_frequencies", "learnable_pos_embed", "x_pad_token")):
            parameter.data = noise(*parameter.shape, seed=6)
    return model, inputs


def fibo():
    model, inputs = relatives._flux(D.BriaFiboTransformer2DModel, text_encoder_dim=12, guidance_embeds=True)
    layers = [noise(1, 5, 12, seed=i) for i in range(4)]
    return model, {**inputs, "text_encoder_layers": layers, "guidance": torch.full((1,), 5.0)}


FACES = {
    "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 6,
    "LFE_vit_dim": 4, "LFE_depth": 5, "LFE_dim_head": 4, "LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 3,
    "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 5,
}  # fmt: skip


def consisid():
    """CogVideoX whose tokens look at a face between the blocks."""
    plain, inputs = zoo.build("cogvideox")
    known = inspect.signature(D.ConsisIDTransformer3DModel.__init__).parameters
    model = D.ConsisIDTransformer3DModel(**{k: v for k, v in plain.config.items() if k in known}, **FACES)
    return model, {**inputs, "id_cond": noise(1, 6), "id_vit_hidden": [noise(1, 7, 4, seed=i) for i in range(5)]}


def pixart_legacy():
    plain, inputs = zoo.build("pixart")
    known = inspect.signature(D.Transformer2DModel.__init__).parameters
    return D.Transformer2DModel(**{k: v for k, v in plain.config.items() if k in known}), inputs


def ltx2_split():
    """LTX-2 with rotary tables per head, and a timestep per token, as image-to-video has it."""
    model, inputs = zoo.build("ltx2", (2, 3, 5))
    for rope in (model.rope, model.audio_rope, model.cross_attn_rope, model.cross_attn_audio_rope):
        rope.rope_type = "split"
    for layer in model.modules():
        if hasattr(layer, "rope_type"):
            layer.rope_type = "split"
    return model, {**inputs, "timestep": torch.arange(30.0)[None], "audio_timestep": torch.tensor([500.0])}


def ltx_frames():
    model, inputs = zoo.build("ltx", (2, 3, 5))
    return model, {**inputs, "timestep": torch.arange(30.0)[None]}


ODD = {
    "cosmos": (2, 3, 5),
    "mochi": (3, 5, 3),
    "zimage": (1, 9, 7),
    "flux2": (1, 5, 7),
    "qwen": (1, 5, 3),
    "pixart": (1, 3, 5),
}
OTHERS = {
    name: lambda name=name: zoo.build(name)
    for name in (
        "cogvideox", "cogvideox15", "cosmos", "flux2", "flux2_references", "hunyuan15", "kontext", "ltx", "ltx2", "mochi",
        "pixart", "qwen", "qwen_edit", "sd3", "sd35", "skyreels", "wan_i2v", "wan_vace", "zimage", "zimage_padded",
    )
}  # fmt: skip
OTHERS |= {f"{name}-odd": lambda name=name, grid=grid: zoo.build(name, grid) for name, grid in ODD.items()}
OTHERS |= {make.__name__: lambda make=make: relatives.build(make) for make in relatives.RELATIVES}
OTHERS |= {make.__name__: lambda make=make: relatives.build(make) for make in (consisid, fibo, pixart_legacy)}
OTHERS |= {make.__name__: make for make in (ltx2_split, ltx_frames)}


def other(name):
    return _stirred(*OTHERS[name]())


def test_every_recipe_is_tried():
    kinds = {type(make()[0]).__name__ for make in OTHERS.values()}
    assert kinds | {type(make()).__name__ for make, _ in MODELS.values()} == set(RECIPES)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_shuffled_dense_equals_the_plain_model_of_every_recipe(name):
    model, inputs = other(name)
    plain, spy = run(model, inputs), Spy(shuffle=True)
    handle = accelerate(model, spy)
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    (site, v), calls = spy.seen[0], len(spy.seen)
    assert all(s.ordered for s, _ in spy.seen) and not handle.record.notes
    handle.order_hook = False
    run(model, inputs)
    at = slice(site.visual.start, site.visual.stop)
    unordered = spy.seen[calls][1][:, :, at]
    torch.testing.assert_close(v[:, :, at], unordered[:, :, shuffled_order(site.grid).token], **TOLERANCE)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_hook_on_and_off_give_the_same_of_every_recipe(name):
    model, inputs = other(name)
    plain, handle = run(model, inputs), accelerate(model, Masked(shuffle=True))
    on = run(model, inputs)
    handle.order_hook = False
    torch.testing.assert_close(run(model, inputs), on, **TOLERANCE)
    assert (on - plain).abs().max() > 1e-3, "the method must matter for this test to mean something"


def _twice(name):
    """Two samples that differ in their latents; what has no samples stays."""
    model, inputs = other(name)
    double = {
        "encoder_hidden_states",
        "timestep",
        "r_timestep",
        "audio_timestep",
        "audio_hidden_states",
        "audio_encoder_hidden_states",
    }
    inputs = {k: torch.cat((v, v)) if k in double or k.endswith("mask") else v for k, v in inputs.items()}
    x = inputs["hidden_states"]
    return model, {**inputs, "hidden_states": torch.cat((x, noise(*x.shape, seed=8)))}


@pytest.mark.parametrize("name", ["anyflow", "chroma", "cosmos-odd", "flux2-odd", "ltx2", "ltx2_split", "ltx_frames"])
def test_samples_of_a_batch_are_permuted_each(name):
    if name.startswith("cosmos"):  # one padding mask for the batch
        model, inputs = _twice(name)
        inputs["padding_mask"] = inputs["padding_mask"][:1]
    else:
        model, inputs = _twice(name)
    plain, spy = run(model, inputs), Spy(shuffle=True)
    accelerate(model, spy)
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(out, model(**inputs, return_dict=False)[0])
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    assert len(out) == 2 and all(site.ordered for site, _ in spy.seen)


def test_ragged_captions_of_a_batch_of_pictures():
    """Z-Image puts its samples one behind the other, pads pictures, and captions behind them."""
    from zoo_images import _zimage

    model, inputs = _stirred(*_zimage((1, 5, 7), (70, 20)))
    model = model.eval()
    with torch.no_grad():
        plain, spy = model(**inputs, return_dict=False)[0], Spy(shuffle=True)
        accelerate(model, spy)
        for x, expected in zip(model(**inputs, return_dict=False)[0], plain, strict=True):
            torch.testing.assert_close(x, expected, **TOLERANCE)
    assert {site.role for site, _ in spy.seen} == {"self", "joint"} and all(site.ordered for site, _ in spy.seen)


def test_what_is_no_module_is_given_back():
    model, inputs = zoo.build("zimage")
    rope, plain = model.rope_embedder, run(model, inputs)
    handle = accelerate(model, Spy(shuffle=True))
    twin = copy.deepcopy(model)
    assert type(twin.rope_embedder) is type(rope) and torch.equal(run(twin, inputs), plain)
    assert model.rope_embedder is not rope
    handle.remove()
    assert model.rope_embedder is rope and torch.equal(run(model, inputs), plain)


# ---- models without a recipe
DENSE = {  # they look like a family, and run dense: nothing to put in order
    "Sana", "SanaVideo", "SanaControlNet",  # linear attention
    "AnyFlowFAR",  # its processor takes one backend only
    "HunyuanVideoFramepack", "WanAnimate2", "Flux3",  # no grid
}  # fmt: skip


def _like_a_family():
    """{class: its finder} of every class of diffusers that takes the arguments and has the config of a family."""
    found = {}
    for name in dir(D):
        kind = getattr(D, name)
        if inspect.isclass(kind) and issubclass(kind, D.ModelMixin):
            forward = {p.name for p in parameters_of(kind)}
            config = set(inspect.signature(kind.__init__).parameters)
            fits = [f for f in FAMILIES if forward >= {*f.forward} and config >= {*f.config}]
            found[name] = fits[0].find if fits else None
    return {name: find for name, find in found.items() if find is not None}


def test_every_class_of_a_family_is_permuted_once_or_says_why_not():
    classes = {name for name, find in _like_a_family().items() if find is not levels}
    dense = {name for name in classes if name.split("Transformer")[0].removesuffix("Model") in DENSE}
    assert classes - dense == set(RECIPES) | set(PLACED) and not dense & (set(RECIPES) | set(PLACED))


def test_as_much_text_as_picture_is_told_apart():
    model, inputs = zoo.build("flux2")
    tokens = inputs["hidden_states"].shape[1]
    inputs["encoder_hidden_states"] = noise(1, tokens, inputs["encoder_hidden_states"].shape[2], seed=4)
    inputs["txt_ids"] = torch.cartesian_prod(*(torch.arange(1),) * 3, torch.arange(tokens))[None]
    plain, spy = run(model, inputs), Spy(shuffle=True)
    accelerate(model, spy)
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    assert all(site.ordered for site, _ in spy.seen)


# ---- UNets: once per level
UNETS = {
    "sd_unet": lambda: zoo.build("sd_unet", (1, 13, 31)),
    "sdxl_unet": lambda: zoo.build("sdxl_unet", (1, 18, 22)),
    "motion_unet": lambda: zoo.build("motion_unet"),
    "svd": lambda: relatives.build(relatives.svd),
    "unet3d": lambda: relatives.build(relatives.unet3d),
}


def test_every_level_is_tried():
    def kinds(model):
        return {type(m).__name__ for m in model.modules() if hasattr(m, "transformer_blocks")}

    assert set().union(*(kinds(make()[0]) for make in UNETS.values())) >= set(LEVELS)


@pytest.mark.parametrize("name", sorted(UNETS))
def test_levels_of_a_unet_are_permuted_once_each(name):
    model, inputs = UNETS[name]()
    plain, spy = run(model, inputs), Spy(shuffle=True)
    handle = accelerate(model, spy)
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    calls = len(spy.seen)
    assert calls and all(site.ordered for site, _ in spy.seen) and not handle.record.notes
    handle.order_hook = False
    assert torch.equal(run(model, inputs), plain)
    assert not any(site.ordered for site, _ in spy.seen[calls:])
    (site, v), (_, unordered) = spy.seen[0], spy.seen[calls]
    torch.testing.assert_close(v, unordered[:, :, shuffled_order(site.grid).token], **TOLERANCE)
    handle.remove()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", sorted(UNETS))
def test_hook_on_and_off_give_the_same_of_every_level(name):
    model, inputs = UNETS[name]()
    plain, handle = run(model, inputs), accelerate(model, Masked(shuffle=True))
    on = run(model, inputs)
    handle.order_hook = False
    torch.testing.assert_close(run(model, inputs), on, **TOLERANCE)
    assert (on - plain).abs().max() > 1e-3, "the method must matter for this test to mean something"


def test_both_halves_of_guidance_pass_a_level_together():
    model, inputs = zoo.build("sd_unet", (1, 9, 11))
    inputs = {"sample": noise(2, 4, 9, 11), "encoder_hidden_states": noise(2, 6, 32), "timestep": inputs["timestep"]}
    plain = run(model, inputs)
    accelerate(model, Spy(shuffle=True))
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)


def test_a_method_that_fits_no_small_level_leaves_it_alone():
    model, inputs = zoo.build("sd_unet")
    spy = Spy(shuffle=True, min_tokens=200)
    accelerate(model, spy)
    run(model, inputs)
    assert {site.grid for site, _ in spy.seen} == {(1, 16, 24)} and all(site.ordered for site, _ in spy.seen)


def test_the_page_names_every_class():
    page = (Path(__file__).parents[2] / "docs" / "order.md").read_text()
    assert [name for name in (*RECIPES, *LEVELS, *PLACED) if f"`{name}`" not in page] == []
    assert all(reason in page for reason in PLACED.values())
