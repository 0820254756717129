"""Whatever runs dense is the plain model to the bit, and the summary says why, once, in a sentence."""

import diffusers as D
import pytest
import torch
import zoo
import zoo_images
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from tiny import noise, run

from foveal.plugins.accelerate import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")


def flux2_cache():
    """References come first while the cache is filled."""
    model, inputs = zoo.build("flux2_references")
    joint = {
        n: Flux2KVParallelSelfAttnProcessor() if "single" in n else Flux2KVAttnProcessor()
        for n in model.attn_processors
    }
    model.set_attn_processor(joint)
    return model, {**inputs, "kv_cache_mode": "extract", "num_ref_tokens": 12}


def flux2_from_cache():
    """References are left to the cache, so the sequence alone would look like a whole picture."""
    model, inputs = flux2_cache()
    with torch.no_grad():
        _, cache = model(**inputs, return_dict=False)
    plain = {**zoo.build("flux2")[1], "kv_cache": cache, "kv_cache_mode": "cached", "num_ref_tokens": 12}
    return model, plain


def ltx2_coordinates():
    model, inputs = zoo.build("ltx2")
    t, h, w = (inputs.pop(name) for name in ("num_frames", "height", "width"))
    coordinates = model.rope.prepare_video_coords(1, t, h, w, "cpu", fps=25.0)
    return model, {**inputs, "video_coords": coordinates}


def qwen_layered():
    torch.manual_seed(0)
    model = D.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), use_layer3d_rope=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(1, 72, 16),
        "encoder_hidden_states": noise(1, 8, 16),
        "img_shapes": [[(1, 4, 6)] * 3],
    }
    return model.eval(), {**inputs, "timestep": torch.tensor([1.0])}


def zimage_omni():
    model, inputs = zoo.build("zimage")
    pictures, captions = [noise(16, 1, 16, 16), noise(16, 1, 16, 16, seed=2)], [noise(10, 16), noise(12, 16, seed=2)]
    return model, {
        **inputs,
        "x": [pictures],
        "cap_feats": [captions],
        "siglip_feats": [None],
        "image_noise_mask": [[0, 1]],
    }


def ltx_coordinates():
    model, inputs = zoo.build("ltx")
    sizes = [torch.arange(float(inputs.pop(name))) for name in ("num_frames", "height", "width")]
    coordinates = torch.stack([x.flatten() for x in torch.meshgrid(*sizes, indexing="ij")])[None]
    return model, {**inputs, "video_coords": coordinates}


def framepack():
    torch.manual_seed(0)
    model = D.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True,
    )  # fmt: skip
    history = {f"latents_{k}": noise(1, 4, n, 8, 8) for k, n in (("clean", 2), ("history_2x", 2), ("history_4x", 4))}
    indices = {f"indices_{k}": torch.arange(v.shape[2]) for k, v in history.items()}
    return model.eval(), {
        "hidden_states": noise(1, 4, 3, 8, 8), "timestep": torch.tensor([500.0]), "encoder_hidden_states": noise(1, 8, 16),
        "encoder_attention_mask": torch.ones(1, 8), "pooled_projections": noise(1, 8), "image_embeds": noise(1, 5, 16),
        "indices_latents": torch.arange(3), "guidance": torch.tensor([6000.0]), **history, **indices,
    }  # fmt: skip


def skyreels_causal():
    model, inputs = zoo.build("skyreels")
    model.num_frame_per_block = 2
    model._set_ar_attention(2)
    return model, inputs


def zimage_ragged():
    model, inputs = zoo_images._zimage((1, 5, 7), (10, 12))
    inputs["x"][1] = inputs["x"][1][..., :-2]
    return model.eval(), inputs


REASONS = {
    flux2_cache: "Flux2 puts reference tokens first, or leaves them to its cache, in its KV cache modes",
    flux2_from_cache: "Flux2 puts reference tokens first, or leaves them to its cache, in its KV cache modes",
    qwen_layered: "Qwen-Image-Layered generates several pictures in one sequence",
    zimage_omni: "Z-Image puts captions and reference images first in its omni mode",
    zimage_ragged: "the pictures of the batch have different sizes",
    ltx_coordinates: "the caller gives LTX no num_frames, height and width (video_coords alone do not show a grid)",
    ltx2_coordinates: "the caller gives LTX no num_frames, height and width (video_coords alone do not show a grid)",
    framepack: "FramePack mixes history tokens of several scales in one sequence, which is no grid",
    skyreels_causal: "an attention mask beyond padding of the text",
    lambda: zoo.build("sana"): "linear attention compares no pairs of tokens, so there are none to leave out",
}


@pytest.mark.parametrize(
    ("make", "reason"), REASONS.items(), ids=[*(f.__name__ for f in list(REASONS)[:-1]), "sana_linear"]
)
def test_what_runs_dense_is_named_once_in_a_sentence(make, reason):
    model, inputs = make()
    plain = run(model, inputs)
    handle = accelerate(model, "grat", group=(1, 2, 2), b=(1, 1, 0))
    assert torch.equal(run(model, inputs), plain)
    (why,) = handle.record.ran_dense_why()
    assert why["reason"] == reason and len(why["layers"]) == len(handle.record.layers)
    text = str(handle.summary())
    assert text.count(reason) == 1 and "Error" not in text and "Traceback" not in text
    assert len(reason.split()) > 5
    handle.remove()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize(
    ("name", "argument", "value"), [("flux", "img_ids", None), ("qwen", "img_shapes", None), ("ltx", "height", "tall")]
)
def test_odd_arguments_are_a_reason_and_never_an_error(name, argument, value):
    from foveal.plugins.diffusers_host.families import recognise

    model, inputs = zoo.build(name)
    known = recognise(model)
    layout = known.layout(model, {**inputs, argument: value})
    assert layout.grid is None
    assert layout.reason == f"the arguments of this call do not show the token grid of a {known.family.name} model"
