"""Tiny transformers of every diffusers family, with inputs: attaching must work on all of them.

``build(name)`` gives a model and the arguments of its forward, on a small grid or a given one; ``SHAPES[name]`` says by hand where
the tokens of its attention calls lie, which the host must find out by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers as D
import torch
import zoo_images
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from tiny import (
    GRID,
    flux_inputs,
    flux_transformer,
    hunyuan_inputs,
    hunyuan_transformer,
    noise,
    wan_inputs,
    wan_transformer,
)

SMALL = (2, 3, 4)


@dataclass(frozen=True)
class Shape:
    """Tokens of one family: text tokens and on which side, visual tokens behind the grid, and where its visual input is.

    grid     the small grid of ``build(name)``; images have T = 1
    text     text tokens in joint attention, 0 for self-attention; ``texts`` are their numbers in other calls of the plain model
    valid    how many of them are real
    extra    tokens behind the grid, as a function of the grid
    visual   the visual input: "latents" [B, C, (T,) H, W], "frames" [B, T, C, H, W], "tokens" [B, N, C], a "list" of [C, T, H, W]
    patch    pixels per token along h and w
    exact    the dense route is the model's own, to the bit
    """

    grid: tuple[int, int, int]
    text: int = 0
    texts: tuple[int, ...] = ()
    valid: int | None = None
    text_first: bool = True
    extra: Callable = lambda grid: 0
    visual: str = "latents"
    patch: int = 2
    exact: bool = True

    def sequences(self):
        """{length of a sequence: its text tokens} of the calls that a method may take over, on the small grid."""
        n = self.grid[0] * self.grid[1] * self.grid[2] + self.extra(self.grid)
        return {n + text: text for text in (0, self.text, *self.texts)}


# ---- video
def _wan_latents(grid, channels=4, batch=1):
    return noise(batch, channels, grid[0], 2 * grid[1], 2 * grid[2])


def wan(grid=GRID):
    return wan_transformer(), wan_inputs(grid=grid)


def wan_i2v(grid=GRID):
    model = wan_transformer(in_channels=36, image_dim=4, added_kv_proj_dim=32)
    inputs = wan_inputs(grid=grid, text=512)  # the processor splits image from text 512 tokens before the end
    inputs["hidden_states"] = _wan_latents(grid, 36)
    return model, {**inputs, "encoder_hidden_states_image": noise(1, 5, 4)}


def wan_ti2v(grid=GRID):
    """Wan 2.2 TI2V: a timestep per token."""
    t, h, w = grid
    return wan_transformer(), {**wan_inputs(grid=grid), "timestep": torch.arange(t * h * w)[None] % 1000}


def wan_vace(grid=SMALL):
    model = D.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=256, ffn_dim=32, num_layers=4, cross_attn_norm=True, rope_max_seq_len=128, vace_layers=[0, 2],
        vace_in_channels=48,
    )  # fmt: skip
    inputs = {"hidden_states": _wan_latents(grid, 16), "timestep": torch.tensor([500])}
    return model, {**inputs, "encoder_hidden_states": noise(1, 12, 32), "control_hidden_states": _wan_latents(grid, 48)}


def skyreels(grid=SMALL):
    model = D.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=128,
    )  # fmt: skip
    inputs = {"hidden_states": _wan_latents(grid), "timestep": torch.tensor([500])}
    return model, {**inputs, "encoder_hidden_states": noise(1, 12, 16)}


def hunyuan(grid=GRID):
    return hunyuan_transformer(), hunyuan_inputs(grid=grid)


def hunyuan15(grid=SMALL):
    model = D.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    return model, {
        "hidden_states": noise(1, 4, *grid), "timestep": torch.tensor([1.0]), "encoder_hidden_states": noise(1, 6, 16),
        "encoder_hidden_states_2": noise(1, 4, 8), "encoder_attention_mask": torch.ones(1, 6),
        "encoder_attention_mask_2": torch.ones(1, 4), "image_embeds": torch.zeros(1, 3, 12),
    }  # fmt: skip


def _cogvideox(grid, frames, grid_type, **changes):
    t, h, w = grid
    model = D.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32,
        num_layers=2, sample_width=2 * w, sample_height=2 * h, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=16, use_rotary_positional_embeddings=True, **changes,
    )  # fmt: skip
    crops = ((0, 0), (h, w)) if grid_type == "linspace" else None
    rope = get_3d_rotary_pos_embed(
        16, crops_coords=crops, grid_size=(h, w), temporal_size=t, grid_type=grid_type, max_size=(h, w)
    )
    inputs = {"hidden_states": noise(1, frames, 4, 2 * h, 2 * w), "encoder_hidden_states": noise(1, 16, 32)}
    return model, {**inputs, "timestep": torch.tensor([500]), "image_rotary_emb": rope}


def cogvideox(grid=GRID):
    return _cogvideox(grid, grid[0], "linspace")


def cogvideox15(grid=SMALL):
    """CogVideoX 1.5: two frames a token."""
    return _cogvideox(grid, 2 * grid[0], "slice", patch_size_t=2, patch_bias=False)


def ltx(grid=SMALL):
    model = D.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip
    t, h, w = grid
    inputs = {"hidden_states": noise(1, t * h * w, 8), "encoder_hidden_states": noise(1, 6, 32)}
    sizes = {"num_frames": t, "height": h, "width": w}
    return model, {**inputs, **sizes, "timestep": torch.tensor([500.0]), "encoder_attention_mask": torch.ones(1, 6)}


def ltx2(grid=SMALL):
    model = D.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    t, h, w = grid
    inputs = {"hidden_states": noise(1, t * h * w, 4), "audio_hidden_states": noise(1, 5, 4)}
    text = {"encoder_hidden_states": noise(1, 6, 16), "audio_encoder_hidden_states": noise(1, 6, 16)}
    sizes = {"num_frames": t, "height": h, "width": w, "audio_num_frames": 5, "fps": 25.0}
    mask = {"encoder_attention_mask": torch.ones(1, 6)}
    return model, {**inputs, **text, **sizes, **mask, "timestep": torch.tensor([500.0])}


def mochi(grid=SMALL):
    model = D.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 5:] = False
    inputs = {"hidden_states": _wan_latents(grid, batch=2), "encoder_hidden_states": noise(2, 16, 16)}
    return model, {**inputs, "timestep": torch.tensor([5, 5]), "encoder_attention_mask": mask}


def cosmos(grid=SMALL):
    _, h, w = grid
    model = D.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 256, 256), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
    )  # fmt: skip
    inputs = {
        "hidden_states": _wan_latents(grid),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": noise(1, 6, 16),
    }
    masks = {"attention_mask": torch.ones(1, 6).bool(), "padding_mask": torch.zeros(1, 1, 2 * h, 2 * w)}
    return model, {**inputs, **masks, "fps": 30}


def flux(grid=(1, 4, 6)):
    return flux_transformer(), flux_inputs(grid=grid)


VIDEO_SHAPES = {
    "wan": Shape(GRID),
    "wan_i2v": Shape(GRID),
    "wan_ti2v": Shape(GRID),
    "wan_vace": Shape(SMALL),
    "skyreels": Shape(SMALL),
    "hunyuan": Shape(GRID, text=8, valid=5, text_first=False),
    "hunyuan15": Shape(SMALL, text=10, texts=(13,), text_first=False, patch=1, exact=False),
    "cogvideox": Shape(GRID, text=16, visual="frames"),
    "cogvideox15": Shape(SMALL, text=16, visual="frames"),
    "ltx": Shape(SMALL, visual="tokens"),
    "ltx2": Shape(SMALL, visual="tokens"),
    "mochi": Shape(SMALL, text=16, texts=(5,), text_first=False),
    "cosmos": Shape(SMALL),
    "flux": Shape((1, 4, 6), text=5, visual="tokens"),
}
IMAGE_SHAPES = {name: Shape(**facts) for name, facts in zoo_images.SHAPES.items()}
SHAPES = {**VIDEO_SHAPES, **IMAGE_SHAPES}
MAKERS = {
    **{name: globals()[name] for name in VIDEO_SHAPES},
    **{name: getattr(zoo_images, name) for name in IMAGE_SHAPES},
}
UNETS = {name: getattr(zoo_images, name) for name in ("sd_unet", "sdxl_unet", "motion_unet")}
REQUIRED = {name: MAKERS[name] for name in ("wan", "flux", "hunyuan")}
OTHERS = {**{name: make for name, make in MAKERS.items() if name not in REQUIRED}, "sana": zoo_images.sana, **UNETS}


def build(name, grid=None):
    """-> (model in eval mode, forward arguments), on the small grid of the family or on a given one."""
    torch.manual_seed(0)
    make = {**REQUIRED, **OTHERS}[name]
    model, inputs = make() if grid is None else make(grid)
    return model.eval(), inputs
