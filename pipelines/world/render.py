"""Pictures of the world: a scene and a path become a clip, in plain differentiable torch, on any device, at any size.

Notable choices
- Coordinates lie in [0, 1]², x to the right, y down; the centre of pixel i is (i + 0.5) / S. Shapes are signed
  distances, coverage is a sigmoid of them, so gradients reach positions and radii.
- Checker and stripe cells are S / 8 pixels wide; stripes vary along x; the second tone is the first + 0.07.
- Motion is constant. World 1: one object, total travel u ~ U(.5, .7) along the unit direction; the object stays
  inside if it can, large objects that move along an axis cannot, and are cut by the border.
- World 2: one or two objects that always stay inside, so travel depends on the radius r (`travel_range`): at most the
  room 1 - 2 (r + .02) and .7, at least .73 of that: .51-.70 for r = .10, .47-.64 for .16, .45-.62 for .17, .32-.44
  for .26. The reader's limit between still and moving, .15, is below half of the smallest travel.
- Two paths may cross, the second object passing over the first; of sixteen drawn pairs of paths the first is taken
  that overlaps little on average (`OVERLAP`), else the least overlapping one, so that both objects can be read.
- The shipped weights were trained on exactly these pictures: a change here invalidates them.

B clips, T frames, S height = width in pixels, O objects (one in world 1, two in world 2: the second may be absent)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveal.pipelines.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PAIR_SIZES,
    SECOND,
    SHAPES,
    SIZES,
)

SHARPNESS = 2.5  # edge slope of the coverage, per pixel
TONE = 0.07  # second tone of checkers and stripes
CELLS = 8  # checker or stripe cells across the frame
MARGIN = 0.02
TRAVEL = (0.5, 0.7)  # of world 1
TRAVEL_SHARE = 0.73  # of world 2: smallest travel relative to the largest
CANDIDATES = 16  # pairs of paths drawn for one that leaves both objects visible
OVERLAP = 0.3  # depth of overlap, mean over frames, that a pair of paths may have; 1: centres on each other
WORLDS = (1, 2)


@dataclass(frozen=True, slots=True)
class Palette:
    """The world's constants as fp32 tensors on one device."""

    colour: Tensor  # [8, 3]
    background: Tensor  # [4, 3]
    radius: Tensor  # [2, 2] number of objects - 1, size
    direction: Tensor  # [9, 2] unit vectors, zero for still


@lru_cache(maxsize=16)
def palette(device: torch.device) -> Palette:
    """The constants on `device`, made once per device; treat them as read-only."""

    def table(rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=device)

    direction = table(list(MOTIONS.values()))
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-6)
    radius = table([list(SIZES.values()), list(PAIR_SIZES.values())])
    return Palette(table(list(COLOURS.values())), table(list(BACKGROUNDS.values())), radius, direction)


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


def coverage(shape: int | Tensor, radius: Tensor, centre: Tensor, size: int, window: int | None = None) -> Tensor:
    """How much of each pixel the object covers.

    shape: one number for all clips, or [B] int64; radius [B]; centre [B, T, 2] as (x, y). window: only the first pixels
    of each axis.  -> [B, T, S, S] (or windows) in (0, 1)
    """
    batch, frames = centre.shape[:2]
    pixels = window or size
    grid = (torch.arange(pixels, device=centre.device) + 0.5) / size
    x = (grid.view(1, 1, 1, pixels) - centre[..., 0, None, None]).expand(batch, frames, pixels, pixels)
    y = (grid.view(1, 1, pixels, 1) - centre[..., 1, None, None]).expand(batch, frames, pixels, pixels)
    r = radius.view(-1, 1, 1, 1)
    if isinstance(shape, int):
        distance = signed_distance(shape, x, y, r)
    else:
        distance = signed_distance(0, x, y, r)
        for k in range(1, len(SHAPES)):
            distance = torch.where((shape == k).view(-1, 1, 1, 1), signed_distance(k, x, y, r), distance)
    return torch.sigmoid(-SHARPNESS * size * distance)


def present(attributes: Tensor) -> Tensor:
    """Which objects there are.  attributes [B, 10] -> [B, 2] bool, the first always"""
    second = attributes[:, SECOND] >= 0
    return torch.stack([torch.ones_like(second), second], 1)


def radii(attributes: Tensor) -> Tensor:
    """Radii of both objects, of an absent second one that of its small kind.  attributes [B, 10] -> [B, 2]"""
    sizes = attributes[:, [0, SECOND]].clamp(min=0)
    two = (attributes[:, SECOND] >= 0).long()
    return palette(attributes.device).radius[two[:, None], sizes]


def travel_range(radius: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest total displacement of a moving object, of the shape of `radius`."""
    if world == 1:
        return torch.full_like(radius, TRAVEL[0]), torch.full_like(radius, TRAVEL[1])
    room = (1 - 2 * (radius + MARGIN)).clamp(max=TRAVEL[1])
    return TRAVEL_SHARE * room, room


def draw_path(attributes: Tensor, frames: int, generator: torch.Generator, world: int = 1) -> Tensor:
    """Random object centres for each clip.  attributes [B, 10] -> [B, O, T, 2], O = `world`

    Numbers are drawn on the generator's device, so a CPU generator gives the same paths everywhere. World 1 has no second
    object and ignores one.
    """
    if world not in WORLDS:
        raise ValueError(f"world {world} does not exist: use 1 (one object) or 2 (one or two).")
    batch, device = attributes.shape[0], attributes.device
    radius = radii(attributes)[:, :world]
    direction = palette(device).direction[attributes[:, [3, SECOND + 3]].clamp(min=0)[:, :world]]  # [B, O, 2]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=generator.device).to(device)

    low, high = travel_range(radius, world)
    travel = (low + (high - low) * uniform(world))[..., None]  # [B, O, 1]
    edge = torch.clamp(radius[..., None] + MARGIN + (direction * travel / 2).abs(), max=0.5)
    time = torch.linspace(-0.5, 0.5, frames, device=device)
    step = (direction * travel)[:, :, None] * time[:, None]  # [B, O, T, 2]
    if world == 1:
        return (edge + uniform(1, 2) * (1 - 2 * edge))[:, :, None] + step
    middle = edge + uniform(CANDIDATES, 2, 2).transpose(0, 1) * (1 - 2 * edge)  # [K, B, O, 2]
    return middle[_visible(middle, step, radius), torch.arange(batch, device=device)][:, :, None] + step


def _visible(middle: Tensor, step: Tensor, radius: Tensor) -> Tensor:
    """The first of K candidates whose objects overlap little on average, else the one that overlaps least.  -> [B]"""
    path = middle[:, :, :, None] + step  # [K, B, O, T, 2]
    distance = (path[:, :, 0] - path[:, :, 1]).norm(dim=-1)
    depth = (1 - distance / radius.sum(1)[:, None]).clamp(min=0).mean(-1)  # [K, B]
    rank = torch.arange(len(middle), device=middle.device)[:, None] * 1e-4
    return ((depth - OVERLAP).clamp(min=0) + rank).argmin(0)


def paint(attributes: Tensor, centre: Tensor, size: int) -> Tensor:
    """Clips of given scenes along given paths.  attributes [B, 10], centre [B, O, T, 2] -> [B, T, 3, S, S] in [0, 1]

    With O = 1 only the first object is drawn.
    """
    world, radius, there = palette(attributes.device), radii(attributes), present(attributes)
    picture = backdrop(attributes[:, 4], attributes[:, 5], size)[:, None]
    for k in range(centre.shape[1]):
        start = (1, SECOND + 1)[k]  # colour and shape of object k
        colour, shape = attributes[:, start : start + 2].clamp(min=0).unbind(1)
        mask = coverage(shape, radius[:, k], centre[:, k], size)[:, :, None] * there[:, k].view(-1, 1, 1, 1, 1)
        picture = picture * (1 - mask) + world.colour[colour].view(-1, 1, 3, 1, 1) * mask
    return picture


def render(attributes: Tensor, frames: int, size: int, generator: torch.Generator, world: int = 1) -> Tensor:
    """Clips of given scenes along random paths.  attributes [B, 10] int64 -> [B, T, 3, S, S] fp32 in [0, 1]"""
    return paint(attributes, draw_path(attributes, frames, generator, world), size)
