"""Pictures of the world: a scene and a path become a clip, in plain differentiable torch, on any device, at any size.

Notable choices
- Coordinates lie in [0, 1]², x to the right, y down; the centre of pixel i is (i + 0.5) / S. Shapes are signed
  distances, coverage is a sigmoid of them, so gradients reach positions and radii.
- Checker and stripe cells are S / 8 pixels wide; stripes vary along x; the second tone is the first + 0.07.
- Motion is constant: total travel u ~ U(.5, .7) along the unit direction. The middle of the path is drawn so that the
  object stays inside if it can; large objects that move along an axis cannot, and are cut by the border.
- The shipped weights were trained on exactly these pictures: a change here invalidates them.

B clips, T frames, S height = width in pixels
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveal.pipelines.world.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES

SHARPNESS = 2.5  # edge slope of the coverage, per pixel
TONE = 0.07  # second tone of checkers and stripes
CELLS = 8  # checker or stripe cells across the frame
MARGIN = 0.02
TRAVEL = (0.5, 0.7)


@dataclass(frozen=True, slots=True)
class Palette:
    """The world's constants as fp32 tensors on one device."""

    colour: Tensor  # [8, 3]
    background: Tensor  # [4, 3]
    radius: Tensor  # [2]
    direction: Tensor  # [9, 2] unit vectors, zero for still


@lru_cache(maxsize=16)
def palette(device: torch.device) -> Palette:
    """The constants on `device`, made once per device; treat them as read-only."""

    def table(rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=device)

    direction = table(list(MOTIONS.values()))
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return Palette(
        table(list(COLOURS.values())), table(list(BACKGROUNDS.values())), table(list(SIZES.values())), direction
    )


def backdrop(style: Tensor, background: Tensor, size: int) -> Tensor:
    """Backgrounds without objects.  style, background [B] int64 -> [B, 3, S, S] in [0, 1]"""
    device = style.device
    cell = torch.arange(size, device=device) // max(1, size // CELLS)
    plain = torch.zeros(size, size, device=device)
    checker = ((cell[:, None] + cell[None]) % 2).float()
    stripes = (cell[None] % 2).float().expand(size, size)
    tone = torch.stack([plain, checker, stripes])[style]
    return palette(device).background[background].view(-1, 3, 1, 1) + TONE * tone[:, None]


def signed_distance(shape: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to shape number `shape` of `SHAPES`; x and y are relative to its centre, negative is inside."""
    norm = torch.sqrt(x * x + y * y + 1e-12)
    ax, ay = x.abs(), y.abs()
    name = SHAPES[shape]
    if name == "circle":
        return norm - radius
    if name == "square":
        return torch.maximum(ax, ay) - 0.85 * radius
    if name == "triangle":
        return torch.maximum(y - 0.7 * radius, (math.sqrt(3) * ax - y) / 2 - 0.5 * radius)
    if name == "ring":
        return (norm - 0.8 * radius).abs() - 0.25 * radius
    horizontal = torch.maximum(ax - radius, ay - 0.3 * radius)
    return torch.minimum(horizontal, torch.maximum(ax - 0.3 * radius, ay - radius))


def coverage(shape: int | Tensor, radius: Tensor, centre: Tensor, size: int) -> Tensor:
    """How much of each pixel the object covers.

    shape: one number for all clips, or [B] int64; radius [B]; centre [B, T, 2] as (x, y).  -> [B, T, S, S] in (0, 1)
    """
    batch, frames = centre.shape[:2]
    grid = (torch.arange(size, device=centre.device) + 0.5) / size
    x = (grid.view(1, 1, 1, size) - centre[..., 0, None, None]).expand(batch, frames, size, size)
    y = (grid.view(1, 1, size, 1) - centre[..., 1, None, None]).expand(batch, frames, size, size)
    r = radius.view(-1, 1, 1, 1)
    if isinstance(shape, int):
        distance = signed_distance(shape, x, y, r)
    else:
        distance = signed_distance(0, x, y, r)
        for k in range(1, len(SHAPES)):
            distance = torch.where((shape == k).view(-1, 1, 1, 1), signed_distance(k, x, y, r), distance)
    return torch.sigmoid(-SHARPNESS * size * distance)


def draw_path(attributes: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Random object centres for each clip.  attributes [B, 6] -> [B, T, 2]

    Numbers are drawn on the generator's device, so a CPU generator gives the same paths everywhere.
    """
    batch, device = attributes.shape[0], attributes.device
    world = palette(device)
    radius, direction = world.radius[attributes[:, 0]], world.direction[attributes[:, 3]]
    low, high = TRAVEL
    travel = low + (high - low) * torch.rand(batch, 1, generator=generator, device=generator.device).to(device)
    where = torch.rand(batch, 2, generator=generator, device=generator.device).to(device)
    edge = torch.clamp(radius[:, None] + MARGIN + (direction * travel / 2).abs(), max=0.5)
    middle = edge + where * (1 - 2 * edge)
    time = torch.linspace(-0.5, 0.5, frames, device=device)
    return middle[:, None] + direction[:, None] * travel[:, None] * time[None, :, None]


def paint(attributes: Tensor, centre: Tensor, size: int) -> Tensor:
    """Clips of given scenes along given paths.  attributes [B, 6], centre [B, T, 2] -> [B, T, 3, S, S] in [0, 1]"""
    world = palette(attributes.device)
    mask = coverage(attributes[:, 2], world.radius[attributes[:, 0]], centre, size)[:, :, None]
    back = backdrop(attributes[:, 4], attributes[:, 5], size)[:, None]
    return back * (1 - mask) + world.colour[attributes[:, 1]].view(-1, 1, 3, 1, 1) * mask


def render(attributes: Tensor, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Clips of given scenes along random paths.  attributes [B, 6] int64 -> [B, T, 3, S, S] fp32 in [0, 1]"""
    return paint(attributes, draw_path(attributes, frames, generator), size)
