"""The renderer of the emoji world: attributes and positions in, pixels out, on any device.

Notable choices
- Pictures lie on whole pixels at one exact size, so a scene is a lookup in an atlas of sprites: no interpolation in the
  training step, and the reader can rebuild a scene exactly.

B samples, S height = width in pixels, a multiple of 64; images are [B, 3, S, S] in [0, 1]
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from foveal.pipelines.emoji.scenes import edges
from foveal.pipelines.emoji.sheet import sprites
from foveal.pipelines.emoji.vocabulary import BACKGROUND, BACKGROUNDS, PAIR_SCALES, SCALES, STYLE, UNITS, A, B

TONE = 0.07  # how much the second tone of checkers and stripes differs
CELLS = 8  # checkers and stripes across the frame
EDGES: tuple[int, ...] = tuple(sorted({*SCALES.values(), *PAIR_SCALES.values()}))


def render(attributes: Tensor, positions: Tensor, size: int) -> Tensor:
    """attributes [B, 7], positions [B, 2, 2] in 1/64 of the frame -> [B, 3, S, S]. Raises ValueError for other sizes."""
    if size % UNITS or size <= 0:
        raise ValueError(f"a frame of {size} px is no multiple of {UNITS}: use 64, 128, 192, 256, ...")
    image = backdrop(attributes[:, STYLE], attributes[:, BACKGROUND], size)
    edge = edges(attributes)
    for k, column in ((1, B), (0, A)):
        image = paste(image, attributes[:, column], edge[k], positions[:, k])
    return image


def paste(image: Tensor, picture: Tensor, edge: Tensor, position: Tensor) -> Tensor:
    """Put one picture into each image.  picture [B] (-1: none), edge [B], position [B, 2] in 1/64 -> the new images"""
    size, unit = image.shape[-1], image.shape[-1] // UNITS
    atlas, base, known = _atlas(size, image.device)
    pixels = edge * unit
    at = torch.arange(size, device=image.device)
    u, v = ((at[None] - position[:, axis, None] * unit) for axis in (0, 1))  # [B, S]
    inside_x, inside_y = ((w >= 0) & (w < pixels[:, None]) for w in (u, v))
    inside = inside_y[:, :, None] & inside_x[:, None] & (picture >= 0)[:, None, None]
    index = (picture[:, None, None] * pixels[:, None, None] + v[:, :, None]) * pixels[:, None, None] + u[:, None]
    index = torch.where(inside, index + base[torch.bucketize(edge, known)][:, None, None], 0)
    found = torch.where(inside[..., None], atlas[index], 0).permute(0, 3, 1, 2)
    return image * (1 - found[:, 3:]) + found[:, :3]


def backdrop(style: Tensor, background: Tensor, size: int) -> Tensor:
    """The empty scene.  style, background [B] -> [B, 3, S, S]"""
    colours, masks = _backdrops(size, style.device)
    first, second = (table[background][:, :, None, None] for table in colours)
    return torch.where(masks[style][:, None], second, first)


@lru_cache(maxsize=16)
def _backdrops(size: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both tones of every background, and where each style has the second one.  -> two [backgrounds, 3], [styles, S, S]"""
    first = torch.tensor(list(BACKGROUNDS.values()), device=device)
    second = torch.where(first.mean(1, keepdim=True) > 0.5, first - TONE, first + TONE)
    cell = torch.arange(size, device=device) * CELLS // size
    stripes, checker = (cell % 2).expand(size, size), (cell[:, None] + cell[None]) % 2
    return (first, second), torch.stack([torch.zeros_like(checker), checker, stripes]).bool()


@lru_cache(maxsize=8)
def _atlas(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Every sprite of one frame size in one list of pixels.  -> [pixels, 4], first pixel of each edge, the edges"""
    parts = [sprites(edge * size // UNITS, device).permute(0, 2, 3, 1).reshape(-1, 4) for edge in EDGES]
    lengths = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)[:-1]
    return torch.cat(parts), lengths.to(device), torch.tensor(EDGES, device=device)
