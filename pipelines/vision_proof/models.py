"""Two small classifiers of one shape and nearly one number of weights: ViG's blocks and DeiT's, behind the same patches.

Letters: B batch, S pixels a side, D width.

Notable choices
- Both cut the image into patches of 4 pixels with one convolution, add learned positions, and average the tokens at the end (no class
  token): the models differ in their blocks alone.
- ViG's stem, which halves the image four times, is left out, because it would leave few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PATCH, CLASSES = 4, 10


@dataclass(frozen=True, kw_only=True)
class Shape:
    """width D is divisible by twice the heads; ViG's weights are DeiT's in number only where 8 D / 3 is a multiple of 256."""

    width: int = 96
    depth: int = 4
    heads: int = 3


def vig(shape: Shape, size: int) -> nn.Module:
    """Blocks of ViG-S: no activation after the convolution, none before the output."""
    from foveal.vision.creating import create

    side = size // PATCH
    model: Any = create("vig_small_patch16_224", **_knobs(shape))
    model.patch_embed = nn.Conv2d(1, shape.width, PATCH, stride=PATCH)
    model.grid_size = (side, side)
    model.pos_embed = nn.Parameter(torch.empty(1, side * side, shape.width))
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    return model


def deit(shape: Shape, size: int) -> nn.Module:
    from foveal.vision.creating import create

    knobs = _knobs(shape) | {"img_size": size, "patch_size": PATCH, "class_token": False, "global_pool": "avg"}
    return create("deit_tiny_patch16_224", **knobs)


def _knobs(shape: Shape) -> dict[str, Any]:
    return {
        "embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads, "in_chans": 1, "num_classes": CLASSES,
    }  # fmt: skip


MODELS = {"deit": deit, "vig": vig}  # the first is the one to compare with


def build(name: str, shape: Shape, size: int, seed: int, device: torch.device) -> nn.Module:
    """A model with fresh weights. ValueError where patches do not divide the image."""
    if size % PATCH:
        raise ValueError(f"{size} pixels are no multiple of the patch of {PATCH}; choose 112 or 224, say.")
    torch.manual_seed(seed)
    return MODELS[name](shape, size).to(device).train()


def weights_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
