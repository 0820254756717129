"""The image half of the zoo: transformers for pictures, and UNets. ``SHAPES`` are keywords of ``zoo.Shape``."""

import diffusers as D
import torch
from tiny import flux_inputs, flux_transformer, image_ids, noise

REFERENCE = (2, 3)  # tokens of a reference picture, high and wide


def _latents(grid, patch=1):
    return noise(1, 4, patch * grid[1], patch * grid[2])


def kontext(grid=(1, 4, 6)):
    """Flux Kontext: a reference picture behind the generated one."""
    inputs, (h, w) = flux_inputs(grid=grid), REFERENCE
    inputs["img_ids"] = torch.cat((inputs["img_ids"], image_ids(h, w, image=1)))
    inputs["hidden_states"] = noise(1, grid[1] * grid[2] + h * w, 16)
    return flux_transformer(), inputs


def _flux2(grid, references):
    model = D.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    one, ids = torch.arange(1), torch.cartesian_prod
    img = [ids(one + 10 * i, torch.arange(h), torch.arange(w), one) for i, (h, w) in enumerate((grid[1:], *references))]
    img_ids = torch.cat(img)[None]
    return model, {
        "hidden_states": noise(1, img_ids.shape[1], 4), "encoder_hidden_states": noise(1, 6, 32),
        "timestep": torch.tensor([1.0]), "img_ids": img_ids, "txt_ids": ids(one, one, one, torch.arange(6))[None],
        "guidance": torch.tensor([1.0]),
    }  # fmt: skip


def flux2(grid=(1, 4, 6)):
    return _flux2(grid, ())


def flux2_references(grid=(1, 4, 6)):
    return _flux2(grid, (REFERENCE, REFERENCE))


def _sd3(grid, **changes):
    model = D.SD3Transformer2DModel(
        sample_size=96, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4, **changes,
    )  # fmt: skip
    inputs = {"hidden_states": _latents(grid), "encoder_hidden_states": noise(1, 6, 32)}
    return model, {**inputs, "pooled_projections": noise(1, 64), "timestep": torch.tensor([500])}


def sd3(grid=(1, 6, 8)):
    return _sd3(grid)


def sd35(grid=(1, 6, 8)):
    """SD3.5 medium: dual layers have a joint and a self attention."""
    return _sd3(grid, dual_attention_layers=(0,), qk_norm="rms_norm")


def _qwen(grid, shapes):
    model = D.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    tokens = sum(t * h * w for t, h, w in shapes)
    inputs = {"hidden_states": noise(1, tokens, 16), "encoder_hidden_states": noise(1, 8, 16), "img_shapes": [shapes]}
    return model, {**inputs, "encoder_hidden_states_mask": mask, "timestep": torch.tensor([1.0])}


def qwen(grid=(1, 4, 6)):
    return _qwen(grid, [tuple(grid)])


def qwen_edit(grid=(1, 4, 6)):
    """Qwen-Image-Edit: a reference picture behind the generated one."""
    return _qwen(grid, [tuple(grid), (1, *REFERENCE)])


def _zimage(grid, captions):
    model = D.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 96, 96],
    )  # fmt: skip
    _, h, w = grid
    pictures = [noise(16, 1, 2 * h, 2 * w, seed=i) for i in range(len(captions))]
    texts = [noise(n, 16, seed=10 + i) for i, n in enumerate(captions)]
    return model, {"x": pictures, "cap_feats": texts, "t": torch.full((len(captions),), 0.5)}


def zimage(grid=(1, 8, 8)):
    return _zimage(grid, (10,))


def zimage_padded(grid=(1, 5, 7)):
    """A picture whose tokens are padded to a multiple of 32."""
    return _zimage(grid, (70,))


def pixart(grid=(1, 4, 6)):
    model = D.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, attention_bias=True, num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_eps=1e-6,
        out_channels=8, use_additional_conditions=False, caption_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    inputs = {
        "hidden_states": _latents(grid, 2),
        "encoder_hidden_states": noise(1, 6, 8),
        "timestep": torch.tensor([5]),
    }
    return model, {**inputs, "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}}


def sana(grid=(1, 6, 8)):
    model = D.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(grid), "encoder_hidden_states": noise(1, 6, 8), "timestep": torch.tensor([5]),
    }  # fmt: skip


# ---- UNets: grid is that of the first level
def _unet_inputs(grid, **more):
    return {"sample": _latents(grid), "timestep": torch.tensor(5), **more}


def sd_unet(grid=(1, 16, 24)):
    model = D.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=32,
        norm_num_groups=2, attention_head_dim=2,
    )  # fmt: skip
    return model, _unet_inputs(grid, encoder_hidden_states=noise(1, 6, 32))


def sdxl_unet(grid=(1, 16, 24)):
    """SDXL: no attention in the first level, several transformer blocks in the others."""
    model = D.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80, cross_attention_dim=64,
        norm_num_groups=1,
    )  # fmt: skip
    more = {"text_embeds": noise(1, 32), "time_ids": torch.zeros(1, 6)}
    return model, _unet_inputs(grid, encoder_hidden_states=noise(1, 6, 64), added_cond_kwargs=more)


def motion_unet(grid=(4, 8, 12)):
    """AnimateDiff: grid[0] frames, a motion module behind every level."""
    unet = D.UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=2, attention_head_dim=2,
    )  # fmt: skip
    motion = D.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    text = noise(1, 6, 32).repeat_interleave(grid[0], 0)
    inputs = {"sample": noise(1, 4, *grid), "timestep": torch.tensor(5), "encoder_hidden_states": text}
    return D.UNetMotionModel.from_unet2d(unet, motion), inputs


def _reference(grid):
    return REFERENCE[0] * REFERENCE[1]


def _two_references(grid):
    return 2 * _reference(grid)


def _padding(grid):
    return -(grid[0] * grid[1] * grid[2]) % 32


SHAPES = {
    "kontext": {"grid": (1, 4, 6), "text": 5, "extra": _reference, "visual": "tokens"},
    "flux2": {"grid": (1, 4, 6), "text": 6, "visual": "tokens"},
    "flux2_references": {"grid": (1, 4, 6), "text": 6, "extra": _two_references, "visual": "tokens"},
    "sd3": {"grid": (1, 6, 8), "text": 6, "text_first": False, "patch": 1},
    "sd35": {"grid": (1, 6, 8), "text": 6, "text_first": False, "patch": 1},
    "qwen": {"grid": (1, 4, 6), "text": 8, "valid": 6, "visual": "tokens"},
    "qwen_edit": {"grid": (1, 4, 6), "text": 8, "valid": 6, "extra": _reference, "visual": "tokens"},
    "zimage": {"grid": (1, 8, 8), "text": 32, "text_first": False, "extra": _padding, "visual": "list"},
    "zimage_padded": {"grid": (1, 5, 7), "text": 96, "text_first": False, "extra": _padding, "visual": "list"},
    "pixart": {"grid": (1, 4, 6)},
}
