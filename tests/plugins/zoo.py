"""Tiny transformers of the other diffusers families, with inputs: attaching must work on all of them."""

import diffusers as D
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from tiny import flux_inputs, flux_transformer, hunyuan_inputs, hunyuan_transformer, noise, wan_inputs, wan_transformer


def wan_i2v():
    model = wan_transformer(in_channels=36, image_dim=4, added_kv_proj_dim=32)
    inputs = wan_inputs(text=512)  # the processor splits image from text 512 tokens before the end
    inputs["hidden_states"] = noise(1, 36, 3, 8, 12)
    return model, {**inputs, "encoder_hidden_states_image": noise(1, 5, 4)}


def wan_vace():
    model = D.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=256, ffn_dim=32, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32, vace_layers=[0, 2],
        vace_in_channels=48,
    )  # fmt: skip
    inputs = {"hidden_states": noise(1, 16, 2, 6, 8), "timestep": torch.tensor([500])}
    return model, {**inputs, "encoder_hidden_states": noise(1, 12, 32), "control_hidden_states": noise(1, 48, 2, 6, 8)}


def skyreels():
    model = D.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {"hidden_states": noise(1, 4, 2, 6, 8), "timestep": torch.tensor([500])}
    return model, {**inputs, "encoder_hidden_states": noise(1, 12, 16)}


def flux2():
    model = D.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    one, ids = torch.arange(1), torch.cartesian_prod
    inputs = {
        "hidden_states": noise(1, 24, 4),
        "encoder_hidden_states": noise(1, 6, 32),
        "timestep": torch.tensor([1.0]),
    }
    return model, {
        **inputs, "img_ids": ids(one, torch.arange(4), torch.arange(6), one)[None],
        "txt_ids": ids(one, one, one, torch.arange(6))[None], "guidance": torch.tensor([1.0]),
    }  # fmt: skip


def hunyuan15():
    model = D.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    return model, {
        "hidden_states": noise(1, 4, 2, 3, 4), "timestep": torch.tensor([1.0]), "encoder_hidden_states": noise(1, 6, 16),
        "encoder_hidden_states_2": noise(1, 4, 8), "encoder_attention_mask": torch.ones(1, 6),
        "encoder_attention_mask_2": torch.ones(1, 4), "image_embeds": torch.zeros(1, 3, 12),
    }  # fmt: skip


def cogvideox():
    model = D.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32,
        num_layers=2, sample_width=6, sample_height=4, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    rope = get_3d_rotary_pos_embed(16, crops_coords=((0, 0), (4, 6)), grid_size=(4, 6), temporal_size=3)
    inputs = {"hidden_states": noise(1, 3, 4, 8, 12), "encoder_hidden_states": noise(1, 16, 32)}
    return model, {**inputs, "timestep": torch.tensor([500]), "image_rotary_emb": rope}


def ltx():
    model = D.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip
    inputs = {"hidden_states": noise(1, 2 * 3 * 4, 8), "encoder_hidden_states": noise(1, 6, 32)}
    sizes = {"num_frames": 2, "height": 3, "width": 4}
    return model, {**inputs, **sizes, "timestep": torch.tensor([500.0]), "encoder_attention_mask": torch.ones(1, 6)}


def ltx2():
    model = D.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    inputs = {"hidden_states": noise(1, 2 * 3 * 4, 4), "audio_hidden_states": noise(1, 5, 4)}
    text = {"encoder_hidden_states": noise(1, 6, 16), "audio_encoder_hidden_states": noise(1, 6, 16)}
    sizes = {"num_frames": 2, "height": 3, "width": 4, "audio_num_frames": 5, "fps": 25.0}
    mask = {"encoder_attention_mask": torch.ones(1, 6)}
    return model, {**inputs, **text, **sizes, **mask, "timestep": torch.tensor([500.0])}


def _sd3(**changes):
    model = D.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4, **changes,
    )  # fmt: skip
    inputs = {"hidden_states": noise(1, 4, 6, 8), "encoder_hidden_states": noise(1, 6, 32)}
    return model, {**inputs, "pooled_projections": noise(1, 64), "timestep": torch.tensor([500])}


def sd3():
    return _sd3()


def sd35():
    return _sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def mochi():
    model = D.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 5:] = False
    inputs = {"hidden_states": noise(2, 4, 2, 6, 8), "encoder_hidden_states": noise(2, 16, 16)}
    return model, {**inputs, "timestep": torch.tensor([5, 5]), "encoder_attention_mask": mask}


def qwen():
    model = D.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    inputs = {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 16), "img_shapes": [(1, 4, 6)]}
    return model, {**inputs, "encoder_hidden_states_mask": mask, "timestep": torch.tensor([1.0])}


def zimage():
    model = D.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {"x": [noise(16, 1, 16, 16)], "cap_feats": [noise(10, 16)], "t": torch.tensor([0.5])}


def pixart():
    model = D.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, attention_bias=True, num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_eps=1e-6,
        out_channels=8, use_additional_conditions=False, caption_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 6, 8),
        "timestep": torch.tensor([5]),
    }
    return model, {**inputs, "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}}


def sana():
    model = D.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(1, 4, 6, 8), "encoder_hidden_states": noise(1, 6, 8), "timestep": torch.tensor([5]),
    }  # fmt: skip


def cosmos():
    model = D.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(1, 4, 2, 6, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": noise(1, 6, 16),
    }
    masks = {"attention_mask": torch.ones(1, 6).bool(), "padding_mask": torch.zeros(1, 1, 6, 8)}
    return model, {**inputs, **masks, "fps": 30}


def _unet_inputs(**more):
    return {"sample": noise(1, 4, 16, 24), "timestep": torch.tensor(5), **more}


def sd_unet():
    model = D.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=32,
        norm_num_groups=2, attention_head_dim=2,
    )  # fmt: skip
    return model, _unet_inputs(encoder_hidden_states=noise(1, 6, 32))


def motion_unet():
    unet = D.UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=2, attention_head_dim=2,
    )  # fmt: skip
    motion = D.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    text = noise(1, 6, 32).repeat_interleave(4, 0)
    inputs = {"sample": noise(1, 4, 4, 8, 12), "timestep": torch.tensor(5), "encoder_hidden_states": text}
    return D.UNetMotionModel.from_unet2d(unet, motion), inputs


REQUIRED = {
    "wan": lambda: (wan_transformer(), wan_inputs()),
    "flux": lambda: (flux_transformer(), flux_inputs()),
    "hunyuan": lambda: (hunyuan_transformer(), hunyuan_inputs()),
}
OTHERS = {
    make.__name__: make
    for make in (
        wan_i2v, wan_vace, skyreels, flux2, hunyuan15, cogvideox, ltx, ltx2, sd3, sd35, mochi, qwen, zimage, pixart, sana,
        cosmos, sd_unet, motion_unet,
    )
}  # fmt: skip


def build(name):
    """-> (model in eval mode, forward arguments)"""
    torch.manual_seed(0)
    model, inputs = {**REQUIRED, **OTHERS}[name]()
    return model.eval(), inputs
