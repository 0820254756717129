"""The exact reader: what a clip shows, found by synthesis, without any network.
 It explains a clip by every (shape, size) in turn, renders each explanation, and keeps the one with the smallest
error. What it returns are exact counterparts of learnt video scores: attributes read, how well any clip of the
world explains this one (`world_psnr`), and how smoothly and how truly the object keeps moving and looking.

Notable choices
- Positions are centroids of the deviation from the backdrop. At the border a cut object's centroid is biased, which
  is why real clips reach about 56 dB and not infinity: always print real clips beside samples, as the upper bound.
- Attributes are the nearest of a finite list, so near-misses count as right; world_psnr and jitter do not saturate.
- Clips are read in chunks: 64 clips of 16 x 64 x 64 stay well below 1 GB.

B clips, T frames, S height = width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from foveal.pipelines.world.render import backdrop, coverage, palette
from foveal.pipelines.world.vocabulary import FIELDS, SHAPES, SIZES, STYLES, Scene, attributes_of, scenes_of

STILL = 0.15  # total displacement below which an object stands still
THRESHOLD = 0.12  # deviation from the backdrop that counts as object
CHUNK = 2**20  # pixels (clips x frames x height x width) read at once


@dataclass(frozen=True, slots=True)
class Reading:
    """What B clips show. All tensors lie on the clips' device; lengths are fractions of the frame."""

    attributes: Tensor  # [B, 6] int64, columns in the order of FIELDS
    world_psnr: Tensor  # [B] dB, of the best explanation by any clip of the world; at most 90
    jitter: Tensor  # [B] mean distance of the centroids from their fitted line
    velocity: Tensor  # [B, 2] total displacement (x, y) along the fitted line
    displacement: Tensor  # [B] its length
    angle_error: Tensor  # [B] degrees between the fitted line and the direction read; NaN for still
    colour_drift: Tensor  # [B] std over frames of the distance between the frame's best colour and the colour read
    area_drift: Tensor  # [B] std over frames of the object's visible area relative to the explanation's

    def __len__(self) -> int:
        return len(self.attributes)

    def scenes(self) -> list[Scene]:
        """The attributes as scenes, one a clip."""
        return scenes_of(self.attributes)


@torch.no_grad()
def read(frames: Tensor) -> Reading:
    """Read clips.  frames [B, T, 3, S, S] in [0, 1] (clamped, any float dtype), T >= 2"""
    if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] != frames.shape[4] or frames.shape[1] < 2:
        raise ValueError(f"clips have shape {tuple(frames.shape)}: pass [B, T, 3, S, S] with T >= 2 and square frames.")
    clips = max(1, CHUNK // (frames.shape[1] * frames.shape[3] * frames.shape[4]))
    parts = [_read_chunk(chunk.float().clamp(0, 1)) for chunk in frames.split(clips)]
    return Reading(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Reading)})


def score(reading: Reading, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Per-clip agreement with what was asked, 1.0 or 0.0.  -> six tensors [B] fp32

    acc_colour, acc_shape, acc_size, acc_motion; acc_scene (style and background); acc_all (all six attributes).
    """
    right = reading.attributes == _asked(reading, scenes)
    columns = {field: right[:, i] for i, field in enumerate(FIELDS)}
    parts = {f"acc_{field}": columns[field] for field in ("colour", "shape", "size", "motion")}
    parts |= {"acc_scene": columns["style"] & columns["background"], "acc_all": right.all(1)}
    return {name: value.float() for name, value in parts.items()}


def direction_error(reading: Reading, scenes: Sequence[Scene]) -> Tensor:
    """Degrees between the motion seen and the motion asked for, NaN where none was asked for.  -> [B]"""
    return _angle(reading.velocity, _asked(reading, scenes)[:, 3])


def _asked(reading: Reading, scenes: Sequence[Scene]) -> Tensor:
    if len(scenes) != len(reading):
        raise ValueError(f"{len(scenes)} scenes for {len(reading)} clips: pass one scene a clip.")
    return attributes_of(scenes, reading.attributes.device)


def _read_chunk(frames: Tensor) -> Reading:
    style, background = _read_backdrop(frames)
    back = backdrop(style, background, frames.shape[-1])[:, None]  # [B, 1, 3, S, S]
    mask = ((frames - back).abs().amax(2) - THRESHOLD).clamp(min=0)
    mask = mask / mask.amax((1, 2, 3), keepdim=True).clamp(min=1e-3)  # [B, T, S, S]
    centroid = _centroids(mask)
    size, colour, shape, error = _explain(frames, back, centroid)
    velocity, jitter = _fit_line(centroid)
    motion = torch.where(
        velocity.norm(dim=1) < STILL, 0, (velocity @ palette(frames.device).direction[1:].T).argmax(1) + 1
    )
    colour_drift, area_drift = _drift(frames, back, mask, centroid, size, colour, shape)
    return Reading(
        attributes=torch.stack([size, colour, shape, motion, style, background], 1),
        world_psnr=-10 * torch.log10(error.clamp(min=1e-9)),
        jitter=jitter,
        velocity=velocity,
        displacement=velocity.norm(dim=1),
        angle_error=_angle(velocity, motion),
        colour_drift=colour_drift,
        area_drift=area_drift,
    )


def _read_backdrop(frames: Tensor) -> tuple[Tensor, Tensor]:
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


def _centroids(mask: Tensor) -> Tensor:
    """[B, T, S, S] weights -> [B, T, 2] centres of mass (x, y)"""
    size = mask.shape[-1]
    grid = (torch.arange(size, device=mask.device) + 0.5) / size
    weight = mask.sum((2, 3)).clamp(min=1e-3)
    return torch.stack([(mask * grid).sum((2, 3)) / weight, (mask * grid[:, None]).sum((2, 3)) / weight], -1)


def _explain(frames: Tensor, back: Tensor, centroid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (size, colour, shape), each [B] int64, and its mean squared error [B]."""
    colours = palette(frames.device).colour
    best = torch.full((len(frames),), torch.inf, device=frames.device)
    found = torch.zeros(3, len(frames), dtype=torch.long, device=frames.device)
    for shape in range(len(SHAPES)):
        for size in range(len(SIZES)):
            mask = _mask_at(shape, size, centroid, frames.shape[-1])  # [B, T, 1, S, S]
            rest = back * (1 - mask)
            fit = ((frames - rest) * mask).sum((1, 3, 4)) / (mask * mask).sum((1, 2, 3, 4))[:, None].clamp(min=1e-6)
            colour = torch.cdist(fit, colours).argmin(1)
            error = ((rest + colours[colour].view(-1, 1, 3, 1, 1) * mask - frames) ** 2).mean((1, 2, 3, 4))
            better = error < best
            best = torch.where(better, error, best)
            new = torch.stack([torch.full_like(colour, size), colour, torch.full_like(colour, shape)])
            found = torch.where(better, new, found)
    return found[0], found[1], found[2], best


def _mask_at(shape: int | Tensor, size: int | Tensor, centroid: Tensor, pixels: int) -> Tensor:
    """Coverage of a shape whose centre of mass, not its centre, lies at `centroid`.  -> [B, T, 1, S, S]"""
    radius = palette(centroid.device).radius[size].expand(len(centroid))
    offset = _centroid_offsets(centroid.device)[shape] * radius.view(-1, 1)
    return coverage(shape, radius, centroid - offset[:, None], pixels)[:, :, None]


@lru_cache(maxsize=16)
def _centroid_offsets(device: torch.device) -> Tensor:
    """Centre of mass of each shape relative to its centre, in radii.  -> [5, 2]"""
    radius, middle = torch.tensor([0.2], device=device), torch.full((1, 1, 2), 0.5, device=device)
    masks = torch.cat([coverage(shape, radius, middle, 256) for shape in range(len(SHAPES))])
    return (_centroids(masks)[:, 0] - 0.5) / 0.2


def _fit_line(centroid: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares line through the centroids over time.  -> total displacement [B, 2], mean distance from it [B]"""
    frames = centroid.shape[1]
    time = torch.arange(frames, device=centroid.device).float() - (frames - 1) / 2
    velocity = (centroid * time[None, :, None]).sum(1) / (time * time).sum() * (frames - 1)
    line = centroid.mean(1, keepdim=True) + velocity[:, None] * (time / (frames - 1))[None, :, None]
    return velocity, (centroid - line).norm(dim=2).mean(1)


def _angle(velocity: Tensor, motion: Tensor) -> Tensor:
    """Degrees between velocities [B, 2] and motions [B] of the vocabulary, NaN where the motion is still."""
    direction = palette(velocity.device).direction[motion]
    cross = velocity[:, 0] * direction[:, 1] - velocity[:, 1] * direction[:, 0]
    angle = torch.rad2deg(torch.atan2(cross.abs(), (velocity * direction).sum(1)))
    return torch.where(motion == 0, torch.nan, angle)


def _drift(
    frames: Tensor, back: Tensor, seen: Tensor, centroid: Tensor, size: Tensor, colour: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor]:
    """How much colour and visible area change from frame to frame, given the best explanation.  -> [B], [B]"""
    mask = _mask_at(shape, size, centroid, frames.shape[-1])
    weight = (mask * mask).sum((2, 3, 4)).clamp(min=1e-6)  # [B, T]
    fit = ((frames - back * (1 - mask)) * mask).sum((3, 4)) / weight[..., None]  # [B, T, 3]
    off = (fit - palette(frames.device).colour[colour][:, None]).norm(dim=2)
    area = seen.sum((2, 3)) / mask.sum((2, 3, 4)).clamp(min=1e-3)
    return off.std(1), area.std(1)
