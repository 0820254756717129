"""One object on a backdrop, explained by every (shape, size) in turn.

Notable choices
- Positions are centroids of the deviation from the backdrop. At the border a cut object's centroid is biased, which
  is why real clips reach about 56 dB and not infinity.

B clips, T frames, S height = width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.pipelines.world.reader_parts import centroids, mask_at
from foveal.pipelines.world.render import palette
from foveal.pipelines.world.vocabulary import SHAPES, SIZES


@dataclass(frozen=True, slots=True)
class OneObject:
    """The best explanation of B clips by one object each."""

    size: Tensor  # [B]
    colour: Tensor  # [B]
    shape: Tensor  # [B]
    centroid: Tensor  # [B, T, 2]
    error: Tensor  # [B] mean squared error
    colour_drift: Tensor  # [B]
    area_drift: Tensor  # [B]


def explain_one(frames: Tensor, back: Tensor, threshold: float) -> OneObject:
    """frames [B, T, 3, S, S] in [0, 1], back [B, 1, 3, S, S]; deviations below `threshold` are backdrop."""
    seen = ((frames - back).abs().amax(2) - threshold).clamp(min=0)
    seen = seen / seen.amax((1, 2, 3), keepdim=True).clamp(min=1e-3)  # [B, T, S, S]
    centroid = centroids(seen)
    size, colour, shape, error = _explain(frames, back, centroid)
    colour_drift, area_drift = _drift(frames, back, seen, centroid, size, colour, shape)
    return OneObject(size, colour, shape, centroid, error, colour_drift, area_drift)


def _explain(frames: Tensor, back: Tensor, centroid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (size, colour, shape), each [B] int64, and its mean squared error [B]."""
    colours = palette(frames.device).colour
    best = torch.full((len(frames),), torch.inf, device=frames.device)
    found = torch.zeros(3, len(frames), dtype=torch.long, device=frames.device)
    for shape in range(len(SHAPES)):
        for size in range(len(SIZES)):
            mask = _mask(shape, size, centroid, frames.shape[-1])  # [B, T, 1, S, S]
            rest = back * (1 - mask)
            fit = ((frames - rest) * mask).sum((1, 3, 4)) / (mask * mask).sum((1, 2, 3, 4))[:, None].clamp(min=1e-6)
            colour = torch.cdist(fit, colours).argmin(1)
            error = ((rest + colours[colour].view(-1, 1, 3, 1, 1) * mask - frames) ** 2).mean((1, 2, 3, 4))
            better = error < best
            best = torch.where(better, error, best)
            new = torch.stack([torch.full_like(colour, size), colour, torch.full_like(colour, shape)])
            found = torch.where(better, new, found)
    return found[0], found[1], found[2], best


def _mask(shape: int | Tensor, size: int | Tensor, centroid: Tensor, pixels: int) -> Tensor:
    radius = palette(centroid.device).radius[0, size].expand(len(centroid))
    return mask_at(shape, radius, centroid, pixels)[:, :, None]


def _drift(
    frames: Tensor, back: Tensor, seen: Tensor, centroid: Tensor, size: Tensor, colour: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor]:
    """How much colour and visible area change from frame to frame, given the best explanation.  -> [B], [B]"""
    mask = _mask(shape, size, centroid, frames.shape[-1])
    weight = (mask * mask).sum((2, 3, 4)).clamp(min=1e-6)  # [B, T]
    fit = ((frames - back * (1 - mask)) * mask).sum((3, 4)) / weight[..., None]  # [B, T, 3]
    off = (fit - palette(frames.device).colour[colour][:, None]).norm(dim=2)
    area = seen.sum((2, 3)) / mask.sum((2, 3, 4)).clamp(min=1e-3)
    return off.std(1), area.std(1)
