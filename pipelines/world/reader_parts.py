"""Parts of the reader: positions, masks, lines and angles.

B clips, T frames, S height = width
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.pipelines.world.render import backdrop, coverage, palette
from foveal.pipelines.world.vocabulary import FIELDS, SHAPES, STYLES

FAINT = 1e-6  # coverage below which a pixel is left alone: denormal numbers are ten times slower on CPUs


def read_backdrop(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The (style, background) pair nearest to the border, two pixels wide, median over time.  -> [B], [B]"""
    size, device = frames.shape[-1], frames.device
    border = torch.ones(size, size, dtype=torch.bool, device=device)
    border[2:-2, 2:-2] = False
    seen = frames[..., border].median(1).values  # [B, 3, P]
    n = len(FIELDS["background"])
    style = torch.arange(len(STYLES), device=device).repeat_interleave(n)
    background = torch.arange(n, device=device).repeat(len(STYLES))
    candidates = backdrop(style, background, size)[..., border]
    best = (seen[:, None] - candidates[None]).abs().mean((2, 3)).argmin(1)
    return style[best], background[best]


def centroids(mask: Tensor) -> Tensor:
    """[B, T, S, S] weights -> [B, T, 2] centres of mass (x, y)"""
    size = mask.shape[-1]
    grid = (torch.arange(size, device=mask.device) + 0.5) / size
    weight = mask.sum((2, 3)).clamp(min=1e-3)
    return torch.stack([(mask * grid).sum((2, 3)) / weight, (mask * grid[:, None]).sum((2, 3)) / weight], -1)


def mask_at(shape: int | Tensor, radius: Tensor, centroid: Tensor, pixels: int, window: int | None = None) -> Tensor:
    """Coverage of a shape whose centre of mass, not its centre, lies at `centroid`.

    shape: one number or [B]; radius [B]; centroid [B, T, 2]; window as in `coverage`.  -> [B, T, S, S]
    """
    offset = centroid_offsets(centroid.device)[shape] * radius.view(-1, 1)
    centre = centroid - offset[:, None]
    if isinstance(shape, int) or centroid.device.type != "cpu":
        return F.threshold(coverage(shape, radius, centre, pixels, window), FAINT, 0)
    out = centroid.new_empty(*centroid.shape[:2], window or pixels, window or pixels)
    for k in range(len(SHAPES)):  # one shape each: five times cheaper than all shapes for all clips
        chosen = (shape == k).nonzero()[:, 0]
        if len(chosen):
            out[chosen] = coverage(k, radius[chosen], centre[chosen], pixels, window)
    return F.threshold(out, FAINT, 0)


@lru_cache(maxsize=16)
def centroid_offsets(device: torch.device) -> Tensor:
    """Centre of mass of each shape relative to its centre, in radii.  -> [5, 2]"""
    radius, middle = torch.tensor([0.2], device=device), torch.full((1, 1, 2), 0.5, device=device)
    masks = torch.cat([coverage(shape, radius, middle, 256) for shape in range(len(SHAPES))])
    return (centroids(masks)[:, 0] - 0.5) / 0.2


def fit_line(centroid: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares line through positions over time.

    centroid [B, T, 2], weight [B, T] (all equal by default).  -> total displacement [B, 2], mean distance from the line
    [B], the line [B, T, 2]
    """
    frames = centroid.shape[1]
    weight = torch.ones_like(centroid[..., 0]) if weight is None else weight
    weight = (weight / weight.sum(1, keepdim=True).clamp(min=1e-12))[..., None]
    time = torch.arange(frames, device=centroid.device).float().view(1, -1, 1) / (frames - 1)
    time = time - (weight * time).sum(1, keepdim=True)
    middle = (weight * centroid).sum(1, keepdim=True)
    velocity = (weight * centroid * time).sum(1) / (weight * time * time).sum(1).clamp(min=1e-9)
    line = middle + velocity[:, None] * time
    return velocity, (weight[..., 0] * (centroid - line).norm(dim=2)).sum(1), line


def motion_of(velocity: Tensor, still: float) -> Tensor:
    """Total displacements [B, 2] -> motions [B]: still, or the nearest of eight directions."""
    moving = (velocity @ palette(velocity.device).direction[1:].T).argmax(1) + 1
    return torch.where(velocity.norm(dim=1) < still, 0, moving)


def angle(velocity: Tensor, motion: Tensor) -> Tensor:
    """Degrees between velocities [B, 2] and motions [B] of the vocabulary, NaN where the motion is still or absent."""
    direction = palette(velocity.device).direction[motion.clamp(min=0)]
    cross = velocity[:, 0] * direction[:, 1] - velocity[:, 1] * direction[:, 0]
    found = torch.rad2deg(torch.atan2(cross.abs(), (velocity * direction).sum(1)))
    return torch.where(motion <= 0, torch.nan, found)
