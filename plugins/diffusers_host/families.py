"""Families of models by structure: what a model must show to belong, where its tokens lie, what its attention layers are for.

* A model belongs when its forward takes the family's arguments, its config has the family's keys, and attention layers lie where
  the family's do. Class names do not count: subclasses, renamed copies and finetunes are recognised.
* What no structure shows, and is decided otherwise:
  - whether joint attention puts text first is written in a processor's body; it is taken to be the family's order, and a sequence
    of another length than the family's runs dense;
  - whether a processor computes softmax attention at all: the names of its class and of its base classes say "Linear" (roles.py);
  - a model that shows the marks of two families belongs to the one that its base classes are named after.
* A model of no family runs dense, and the reason names the nearest family and what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveal.plugins.diffusers_host import grid
from foveal.plugins.diffusers_host.grid import Layout, nothing
from foveal.plugins.diffusers_host.structure import Structure, structure_of

NEAR = 0.34  # a family is named as the nearest when at most this share of its marks is missing
TEXT = ("encoder_hidden_states", "timestep")
VISUAL = ("hidden_states", *TEXT)
CROSS = ((r"\.attn1$", "self"), (r"\.attn2$", "cross"))
REFINER = (r"token_refiner|context_refiner|siglip_refiner", "text")


@dataclass(frozen=True)
class Family:
    """One layout of tokens.

    forward, config   arguments and config keys that a model must have
    core              pattern of attention layers that it must have
    roles             (pattern, role) of its attention layers; the first match wins, and what matches nothing is left alone
    find              where the tokens of a call lie
    valid             valid text tokens per sample of a call; None: text is never padded
    mask              name of the argument whose values ``valid`` must look at, where it must
    classes           what its classes are called, asked only when two families fit
    """

    name: str
    forward: tuple[str, ...]
    config: tuple[str, ...]
    core: str
    roles: tuple[tuple[str, str], ...]
    find: Callable[[nn.Module, dict[str, Any]], Layout]
    valid: Callable[[dict[str, Any]], Tensor | list[int] | None] | None = None
    mask: str | None = None
    classes: tuple[str, ...] = ()

    def missing(self, structure: Structure) -> list[str]:
        """What a model lacks to belong, as parts of a sentence; empty when it belongs."""
        lacks = [f"its forward takes no {name}" for name in self.forward if name not in structure.forward]
        lacks += [f"its config has no {name}" for name in self.config if name not in structure.config]
        if not any(re.search(self.core, name) for name in structure.layers):
            lacks.append(f"it has no attention layers named like {_example(self.core)}")
        return lacks

    @property
    def marks(self) -> int:
        return len(self.forward) + len(self.config) + 1

    @property
    def has_levels(self) -> bool:
        """A UNet: every level shows its own grid."""
        return self.find is grid.levels

    def named_after(self, structure: Structure) -> bool:
        return any(base.startswith(self.classes) for base in structure.bases)

    def role(self, layer: str) -> str:
        return next((role for pattern, role in self.roles if re.search(pattern, layer)), "unknown")


@dataclass(frozen=True)
class Known:
    """What is known of one model: its family, or the reason why it has none."""

    family: Family | None
    structure: Structure
    reason: str = ""

    def layout(self, model: nn.Module, call: dict[str, Any]) -> Layout:
        """Layout of a model call from its bound arguments. Never raises for an odd call: no grid, and the reason."""
        if self.family is None:
            return nothing(self.reason)
        try:
            layout = self.family.find(model, call)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return nothing(f"the arguments of this call do not show the token grid of a {self.family.name} model")
        return nothing("the token grid is empty") if layout.grid is not None and min(layout.grid) < 1 else layout


def recognise(model: nn.Module) -> Known:
    """The family of a model, by its structure."""
    return family_of(structure_of(model))


def family_of(structure: Structure) -> Known:
    fits = [family for family in FAMILIES if not family.missing(structure)]
    if len(fits) > 1:
        fits = [family for family in fits if family.named_after(structure)] or fits
    if len(fits) == 1:
        return Known(fits[0], structure)
    where = f"the token grid of {structure.name} is unknown"
    if fits:
        names = " and ".join(family.name for family in fits)
        return Known(None, structure, f"{where}: it is built like {names} at once")
    nearest = min(FAMILIES, key=lambda family: len(family.missing(structure)) / family.marks)
    lacks = nearest.missing(structure)
    if len(lacks) > NEAR * nearest.marks:
        return Known(None, structure, f"{where}: it is built like no model that foveal knows")
    return Known(None, structure, f"{where}: it is built like {nearest.name}, but {', '.join(lacks)}")


def _example(pattern: str) -> str:
    """A layer name that a pattern stands for."""
    return re.sub(r"\(.*?\)\?|[\^$\\]", "", pattern.replace(r"\d+", "0")).lstrip(".")


FAMILIES = (
    Family(
        "Flux", (*VISUAL, "img_ids", "txt_ids"), ("axes_dims_rope", "joint_attention_dim", "num_single_layers"),
        core=r"^transformer_blocks\.\d+\.attn$", roles=((r"^(single_)?transformer_blocks\.\d+\.attn$", "joint"),),
        find=grid.flux, classes=("Flux", "Chroma", "Bria", "Ovis", "LongCatImage"),
    ),
    Family(
        "Qwen-Image", (*VISUAL, "encoder_hidden_states_mask", "img_shapes"),
        ("axes_dims_rope", "joint_attention_dim", "use_layer3d_rope"),
        core=r"^transformer_blocks\.\d+\.attn$", roles=((r"^transformer_blocks\.\d+\.attn$", "joint"),),
        find=grid.qwen, mask="encoder_hidden_states_mask", classes=("QwenImage",),
    ),
    Family(
        "Z-Image", ("x", "t", "cap_feats", "patch_size", "f_patch_size"), ("all_patch_size", "all_f_patch_size", "cap_feat_dim"),
        core=r"^layers\.\d+\.attention$",
        roles=(REFINER, (r"^layers\.\d+\.attention$", "joint"), (r"^noise_refiner\.\d+\.attention$", "self")),
        find=grid.zimage, valid=grid.padded_captions, classes=("ZImage",),
    ),
    Family(
        "SD3", (*VISUAL, "pooled_projections", "block_controlnet_hidden_states"),
        ("patch_size", "pos_embed_max_size", "caption_projection_dim", "joint_attention_dim"),
        core=r"^transformer_blocks\.\d+\.attn$", roles=((r"^transformer_blocks\.\d+\.attn$", "joint"), (r"^transformer_blocks\.\d+\.attn2$", "self")),
        find=grid.sd3, classes=("SD3",),
    ),
    Family(
        "PixArt and Sana", (*VISUAL, "attention_mask", "encoder_attention_mask"),
        ("patch_size", "sample_size", "cross_attention_dim", "caption_channels"),
        core=r"^transformer_blocks\.\d+\.attn1$", roles=CROSS, find=grid.image, classes=("PixArt", "Sana"),
    ),
    Family(
        "Wan", (*VISUAL, "encoder_hidden_states_image"), ("patch_size", "freq_dim", "ffn_dim", "text_dim"),
        core=r"^blocks\.\d+\.attn1$", roles=CROSS, find=grid.video, classes=("Wan", "SkyReels", "ChronoEdit", "AnyFlow"),
    ),
    Family(
        "Cosmos", (*VISUAL, "fps", "condition_mask", "padding_mask"), ("patch_size", "max_size", "rope_scale"),
        core=r"^transformer_blocks\.\d+\.attn1$", roles=CROSS, find=grid.video, classes=("Cosmos",),
    ),
    Family(
        "CogVideoX", (*VISUAL, "timestep_cond", "image_rotary_emb"),
        ("patch_size", "sample_frames", "temporal_compression_ratio", "max_text_seq_length"),
        core=r"^transformer_blocks\.\d+\.attn1$", roles=((r"^transformer_blocks\.\d+\.attn1$", "joint"),),
        find=grid.cogvideox, classes=("CogVideoX", "ConsisID"),
    ),
    Family(
        "Mochi", (*VISUAL, "encoder_attention_mask"),
        ("patch_size", "pooled_projection_dim", "text_embed_dim", "time_embed_dim", "max_sequence_length"),
        core=r"^transformer_blocks\.\d+\.attn1$", roles=((r"^transformer_blocks\.\d+\.attn1$", "joint"),),
        find=grid.mochi, classes=("Mochi",),
    ),
    Family(
        "LTX", (*VISUAL, "encoder_attention_mask", "num_frames", "height", "width"), ("patch_size", "patch_size_t", "caption_channels"),
        core=r"^transformer_blocks\.\d+\.attn1$",
        roles=((r"\.(audio_to_video|video_to_audio)_attn$", "av_cross"), (r"\.audio_attn\d$", "audio"), *CROSS),
        find=grid.ltx, classes=("LTX",),
    ),
    Family(
        "HunyuanVideo", (*VISUAL, "encoder_attention_mask"),
        ("patch_size", "patch_size_t", "rope_axes_dim", "num_refiner_layers", "text_embed_dim"),
        core=r"^transformer_blocks\.\d+\.attn$",
        roles=(REFINER, (r"^(single_)?transformer_blocks\.\d+\.attn$", "joint")),
        find=grid.hunyuan, valid=grid.text_lengths, classes=("HunyuanVideo",),
    ),
    Family(
        "a UNet", ("sample", *TEXT), ("block_out_channels", "down_block_types", "layers_per_block"),
        core=r"\.attentions\.\d+\.transformer_blocks\.\d+\.attn1$",
        roles=((r"motion_modules|temporal_transformer_blocks|temp_attentions|transformer_in", "temporal"),
               (r"\.transformer_blocks\.\d+\.attn1$", "self"), (r"\.transformer_blocks\.\d+\.attn2$", "cross")),
        find=grid.levels, classes=("UNet", "ControlNet"),
    ),
)  # fmt: skip
