"""The exact reader: what an image shows, found by synthesis, without any network.

It tries every picture at every scale and place, by correlation, keeps the scene of one picture and the scene of two that
explain the image best, and takes the better of them. What it returns are exact counterparts of learnt image scores: the
words read, where the pictures lie, and how well any scene of this world explains the image (`emoji_psnr`).

Notable choices
- The search runs on means over 1/64 of the frame. Pictures lie on whole units and backdrops are constant inside one, so
  for a scene of this world the search is exact at every frame size; `emoji_psnr` is measured on all pixels.
- The change of squared error that a pasted picture makes is, over all places, a sum of correlations: a few Fourier
  transforms an image instead of three million comparisons.
- Words are the nearest of a finite list, so near-misses count as right; emoji_psnr does not saturate.

B images, S height = width in pixels, P pictures, U = 64 units of the frame; images are [B, 3, S, S] in [0, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.pipelines.emoji.pictures import NAMES
from foveal.pipelines.emoji.render import backdrop, render
from foveal.pipelines.emoji.sheet import sprites
from foveal.pipelines.emoji.vocabulary import (
    BACKGROUND,
    BACKGROUNDS,
    PAIR_SCALES,
    RELATION,
    RELATIONS,
    SCALE_A,
    SCALE_B,
    SCALES,
    STYLE,
    STYLES,
    UNITS,
    A,
    B,
    Scene,
    attributes_of,
    scenes_of,
)

CHUNK = 8  # images searched at once: their maps take 100 MB
ONE, TWO = tuple(SCALES.values()), tuple(PAIR_SCALES.values())


@dataclass(frozen=True, slots=True)
class Reading:
    """What B images show. All tensors lie on the images' device."""

    attributes: Tensor  # [B, 7] int64, the left or upper picture first
    positions: Tensor  # [B, 2, 2] int64, upper left corners in 1/64 of the frame
    emoji_psnr: Tensor  # [B] dB, of the best explanation by any scene of this world; at most 90

    def __len__(self) -> int:
        return len(self.attributes)

    def scenes(self) -> list[Scene]:
        """The attributes as scenes, one an image."""
        return scenes_of(self.attributes)


@torch.no_grad()
def read(images: Tensor) -> Reading:
    """Read images.  [B, 3, S, S] in [0, 1] (clamped, any float dtype), S a multiple of 64"""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[3] % UNITS:
        raise ValueError(f"images have shape {tuple(images.shape)}: pass [B, 3, S, S] with S a multiple of {UNITS}.")
    parts = [_read_chunk(chunk.float().clamp(0, 1)) for chunk in images.split(CHUNK)]
    return Reading(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Reading)})


def score(reading: Reading, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Per-image agreement with what was asked, 1.0 or 0.0.  -> tensors [B] fp32

    acc_object: the pictures asked for and no other; acc_pair: the same, NaN for prompts with one picture; acc_relation:
    those pictures and their relation, NaN likewise; acc_scale: those pictures and their scales; acc_scene: style and
    background; acc_all: everything.
    """
    if len(scenes) != len(reading):
        raise ValueError(f"{len(scenes)} scenes for {len(reading)} images: pass one scene an image.")
    asked = attributes_of(scenes, reading.attributes.device)
    swap = reading.attributes[:, A] != asked[:, A]
    seen = torch.where(swap[:, None], _swapped(reading.attributes), reading.attributes)
    right, pair = seen == asked, asked[:, B] >= 0
    pictures = right[:, A] & right[:, B]
    parts = {
        "acc_object": pictures,
        "acc_pair": pictures,
        "acc_relation": pictures & right[:, RELATION],
        "acc_scale": pictures & right[:, SCALE_A] & right[:, SCALE_B],
        "acc_scene": right[:, STYLE] & right[:, BACKGROUND],
        "acc_all": right.all(1),
    }
    found = {name: value.float() for name, value in parts.items()}
    for name in ("acc_pair", "acc_relation"):
        found[name] = torch.where(pair, found[name], torch.nan)
    return found


def _swapped(attributes: Tensor) -> Tensor:
    """The same scenes, told from the other picture; unchanged where there is only one."""
    relation = attributes[:, RELATION]
    other = attributes[:, [B, SCALE_B, RELATION, A, SCALE_A, STYLE, BACKGROUND]].clone()
    other[:, RELATION] = relation + 1 - 2 * (relation % 2)  # left of <-> right of, above <-> below
    return torch.where((attributes[:, B] >= 0)[:, None], other, attributes)


def _read_chunk(images: Tensor) -> Reading:
    size = images.shape[-1]
    small = F.avg_pool2d(images, size // UNITS)
    style, background = _read_backdrop(small)
    back = backdrop(style, background, UNITS)
    picture, scale, position, gain = _best(_changes(small, back, ONE, size), ONE)
    first = _best(changes := _changes(small, back, TWO, size), TWO)
    second = _best(_without(changes, first, TWO), TWO)
    first = _best(_without(changes, second, TWO), TWO)  # once more, now that the other one is known
    paired = first[3] + second[3] < gain
    nothing = torch.full_like(picture, -1)
    one = torch.stack([picture, scale, nothing, nothing, nothing, style, background], 1)
    two, places = _ordered(first, second, style, background)
    alone = torch.stack([position, torch.zeros_like(position)], 1)
    attributes = torch.where(paired[:, None], two, one)
    positions = torch.where(paired[:, None, None], places, alone)
    error = (render(attributes, positions, size) - images).square().mean((1, 2, 3))
    return Reading(attributes, positions, -10 * torch.log10(error.clamp(min=1e-9)))


def _read_backdrop(small: Tensor) -> tuple[Tensor, Tensor]:
    """The (style, background) pair nearest to the border, one unit wide.  -> [B], [B]"""
    device, n = small.device, len(BACKGROUNDS)
    border = torch.ones(UNITS, UNITS, dtype=torch.bool, device=device)
    border[1:-1, 1:-1] = False
    style = torch.arange(len(STYLES), device=device).repeat_interleave(n)
    background = torch.arange(n, device=device).repeat(len(STYLES))
    candidates = backdrop(style, background, UNITS)[..., border]
    best = (small[..., border][:, None] - candidates[None]).abs().mean((2, 3)).argmin(1)
    return style[best], background[best]


def _changes(small: Tensor, back: Tensor, edges: tuple[int, ...], size: int) -> Tensor:
    """Change of squared error by pasting each picture at each scale and place.  -> [B, P, len(edges), U, U]

    With rest d = image - backdrop b, colours c (opacity-multiplied) and opacity a, pasting at a place changes the error by
    -2 sum d (c - a b) + sum (c - a b)^2, which falls apart into correlations of d, d b, b, b^2 with c, a, c a, a^2.
    """
    rest = small - back
    parts = [-2 * rest, 2 * (rest * back).sum(1, keepdim=True), -2 * back, back.square().sum(1, keepdim=True)]
    image = torch.fft.rfft2(torch.cat(parts, 1))  # [B, 8, U, U / 2 + 1]
    maps = []
    for edge in edges:
        template, energy = _templates(edge, size, small.device)
        spectrum = torch.einsum("bcuv,pcuv->bpuv", image, template)
        change = torch.fft.irfft2(spectrum, s=(UNITS, UNITS)) + energy[None, :, None, None]
        inside = torch.arange(UNITS, device=small.device) <= UNITS - edge
        maps.append(torch.where(inside[:, None] & inside[None], change, torch.inf))
    return torch.stack(maps, 2)


@lru_cache(maxsize=16)
def _templates(edge: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Conjugate spectra of c, a, c a, a^2 of every picture, and sum c^2.  -> [P, 8, U, U / 2 + 1], [P]"""
    whole = F.avg_pool2d(sprites(edge * size // UNITS, device), size // UNITS)
    colour, opacity = whole[:, :3], whole[:, 3:]
    parts = torch.cat([colour, opacity, colour * opacity, opacity.square()], 1)
    spectra = torch.fft.rfft2(F.pad(parts, (0, UNITS - edge, 0, UNITS - edge))).conj().resolve_conj()
    return spectra, colour.square().sum((1, 2, 3))


Found = tuple[Tensor, Tensor, Tensor, Tensor]  # picture [B], index of its scale [B], place (x, y) [B, 2], change [B]


def _best(changes: Tensor, edges: tuple[int, ...]) -> Found:
    gain, index = changes.flatten(1).min(1)
    x, index = index % UNITS, index // UNITS
    y, index = index % UNITS, index // UNITS
    return index // len(edges), index % len(edges), torch.stack([x, y], 1), gain


def _without(changes: Tensor, found: Found, edges: tuple[int, ...]) -> Tensor:
    """The changes at places that do not overlap with a picture already found, for other pictures than that."""
    picture, scale, position, _ = found
    device = changes.device
    low = (
        position[:, None] - torch.tensor(edges, device=device)[None, :, None]
    )  # [B, edges, 2] last free place before it
    high = (position + torch.tensor(edges, device=device)[scale][:, None])[:, None]
    at = torch.arange(UNITS, device=device)
    clear = [(at <= low[..., axis, None]) | (at >= high[..., axis, None]) for axis in (0, 1)]  # each [B, edges, U]
    free = clear[1][..., :, None] | clear[0][..., None, :]
    other = torch.arange(len(NAMES), device=device)[None] != picture[:, None]
    return torch.where(free[:, None] & other[:, :, None, None, None], changes, torch.inf)


def _ordered(first: Found, second: Found, style: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Attributes [B, 7] and positions [B, 2, 2], the left or upper picture first."""
    table = torch.tensor(TWO, device=style.device)
    apart = (2 * second[2] + table[second[1]][:, None]) - (2 * first[2] + table[first[1]][:, None])  # of the middles
    upright = apart[:, 1].abs() > apart[:, 0].abs()
    swap = torch.where(upright, apart[:, 1], apart[:, 0]) < 0
    pick = [(torch.where(swap, b, a), torch.where(swap, a, b)) for a, b in zip(first[:2], second[:2], strict=True)]
    relation = torch.where(upright, list(RELATIONS).index("above"), list(RELATIONS).index("left of"))
    columns = [pick[0][0], pick[1][0], relation, pick[0][1], pick[1][1], style, background]
    places = torch.stack([first[2], second[2]], 1)
    return torch.stack(columns, 1), torch.where(swap[:, None, None], places.flip(1), places)
