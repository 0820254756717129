"""The exact reader: what a clip shows, found by synthesis, without any network.
 It explains a clip by one object and by two, renders each explanation, and keeps what has the smallest error. What it
returns are exact counterparts of learnt video scores: attributes read, how well any clip of the world explains this one
(`world_psnr`), and how smoothly and how truly the objects keep moving and looking.

Notable choices
- The prompt plays no part in a reading: which objects there are, and how many, is decided by the pixels. `score` then
  matches them with what was asked for, whichever way round fits better.
- A second object is there if it lowers the mean squared error by `GAIN`, about a third of what the faintest one does, and
  by a tenth of what is left. In clips as noisy as 15 dB, faint second objects are therefore missed.
- Attributes are the nearest of a finite list, so near-misses count as right; world_psnr and jitter do not saturate.
- Real clips do not reach infinite PSNR either: always print real clips beside samples, as the upper bound.
- Clips are read in chunks, so that memory stays well below 1 GB.

B clips, T frames, S height = width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from foveal.pipelines.world.reader_one import OneObject, explain_one
from foveal.pipelines.world.reader_parts import angle, fit_line, motion_of, read_backdrop
from foveal.pipelines.world.reader_two import TwoObjects, colour_masses, explain_two
from foveal.pipelines.world.render import backdrop
from foveal.pipelines.world.vocabulary import OBJECT_FIELDS, SECOND, Scene, attributes_of, scenes_of

STILL = 0.15  # total displacement below which an object stands still; the smallest travel is .32
THRESHOLD = 0.12  # deviation from the backdrop that counts as object
SECOND_MASS = 0.003  # share of the frame in a second colour from which two objects are tried; the smallest covers .017
GAIN = 2.5e-4  # mean squared error that the second object must explain
GAIN_SHARE = 0.1  # the same, relative to what both objects leave unexplained: noise shows no objects
CHUNK = 2**20  # pixels (clips x frames x height x width) read at once; eight times as many on a GPU


@dataclass(frozen=True, slots=True)
class Reading:
    """What B clips show. All tensors lie on the clips' device; lengths are fractions of the frame.

    Per object (axis 1): a second object that is not there has NaN. Per clip: means over its objects.
    """

    attributes: Tensor  # [B, 10] int64, columns in the order of FIELDS, then the second object's, -1 without one
    world_psnr: Tensor  # [B] dB, of the best explanation by any clip of the world; at most 90
    jitter: Tensor  # [B] mean distance of the positions from their fitted line
    velocity: Tensor  # [B, 2, 2] total displacement (x, y) along the fitted line, per object
    displacement: Tensor  # [B, 2] its length
    angle_error: Tensor  # [B, 2] degrees between the fitted line and the direction read; NaN for still
    colour_drift: Tensor  # [B] std over frames of the distance between the frame's best colour and the colour read
    area_drift: Tensor  # [B] std over frames of the visible area relative to the explanation's

    def __len__(self) -> int:
        return len(self.attributes)

    @property
    def objects(self) -> Tensor:
        """How many objects each clip shows.  -> [B] int64"""
        return 1 + (self.attributes[:, SECOND] >= 0).long()

    def scenes(self) -> list[Scene]:
        """The attributes as scenes, one a clip."""
        return scenes_of(self.attributes)


@torch.no_grad()
def read(frames: Tensor) -> Reading:
    """Read clips.  frames [B, T, 3, S, S] in [0, 1] (clamped, NaN counts as 0, any float dtype), T >= 2"""
    if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] != frames.shape[4] or frames.shape[1] < 2:
        raise ValueError(f"clips have shape {tuple(frames.shape)}: pass [B, T, 3, S, S] with T >= 2 and square frames.")
    most = CHUNK if frames.device.type == "cpu" else 8 * CHUNK
    clips = max(1, most // (frames.shape[1] * frames.shape[3] * frames.shape[4]))
    parts = [_read_chunk(chunk.float().nan_to_num(0).clamp(0, 1)) for chunk in frames.split(clips)]
    return Reading(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Reading)})


def score(reading: Reading, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Per-clip agreement with what was asked, 1.0 or 0.0.  -> eight tensors [B] fp32

    acc_count: as many objects as asked for. acc_colour, acc_shape, acc_size, acc_motion: every object asked for is there
    and has it. acc_objects: these five. acc_scene: style and background. acc_all: everything.
    """
    asked = _asked(reading, scenes)
    right, _ = _matched(reading.attributes, asked)
    count = (reading.attributes[:, SECOND] >= 0) == (asked[:, SECOND] >= 0)
    parts = {f"acc_{field}": right[:, i] for i, field in enumerate(OBJECT_FIELDS)}
    objects = count & right.all(1)
    scene = (reading.attributes[:, 4:6] == asked[:, 4:6]).all(1)
    parts |= {"acc_scene": scene, "acc_count": count, "acc_objects": objects, "acc_all": objects & scene}
    return {name: value.float() for name, value in parts.items()}


def direction_error(reading: Reading, scenes: Sequence[Scene]) -> Tensor:
    """Degrees between the motions seen and asked for, mean over the objects asked to move; NaN without one.  -> [B]"""
    asked = _asked(reading, scenes)
    _, swap = _matched(reading.attributes, asked)
    velocity = torch.where(swap[:, None, None], reading.velocity.flip(1), reading.velocity)
    found = [angle(velocity[:, k], asked[:, column]) for k, column in enumerate((3, SECOND + 3))]
    return torch.stack(found, 1).nanmean(1)


def _asked(reading: Reading, scenes: Sequence[Scene]) -> Tensor:
    if len(scenes) != len(reading):
        raise ValueError(f"{len(scenes)} scenes for {len(reading)} clips: pass one scene a clip.")
    return attributes_of(scenes, reading.attributes.device)


def _objects_of(attributes: Tensor) -> Tensor:
    """-> [B, 2, 4] size, colour, shape, motion of both objects; -1 for an absent one"""
    return torch.stack([attributes[:, : len(OBJECT_FIELDS)], attributes[:, SECOND:]], 1)


def _matched(seen: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Objects matched with those asked for, the way that makes more attributes right.

    -> [B, 4] bool, attribute right for every object asked for; [B] bool, whether seen objects were swapped
    """
    seen, asked = _objects_of(seen), _objects_of(asked)
    wanted = asked[:, :, :1] >= 0  # [B, 2, 1]
    straight, crossed = (seen == asked) | ~wanted, (seen.flip(1) == asked) | ~wanted
    swap = crossed.sum((1, 2)) > straight.sum((1, 2))
    return torch.where(swap[:, None, None], crossed, straight).all(1), swap


def _read_chunk(frames: Tensor) -> Reading:
    style, background = read_backdrop(frames)
    back = backdrop(style, background, frames.shape[-1])[:, None]  # [B, 1, 3, S, S]
    one = _one(explain_one(frames, back, THRESHOLD), style, background)
    masses, colours = colour_masses(frames, back, THRESHOLD).topk(2, 1)
    chosen = (masses[:, 1] > SECOND_MASS).nonzero()[:, 0]
    if not len(chosen):
        return one
    pair = explain_two(frames[chosen], back[chosen], colours[chosen], THRESHOLD)
    alone = torch.minimum(_mse(one.world_psnr[chosen]), pair.error_without)
    kept = alone - pair.error > (GAIN_SHARE * pair.error).clamp(min=GAIN)
    two = _two(pair, style[chosen], background[chosen])
    values = {}
    for field in fields(Reading):
        merged = getattr(one, field.name).clone()
        merged[chosen[kept]] = getattr(two, field.name)[kept]
        values[field.name] = merged
    return Reading(**values)


def _one(found: OneObject, style: Tensor, background: Tensor) -> Reading:
    velocity, jitter, _ = fit_line(found.centroid)
    motion = motion_of(velocity, STILL)
    columns = [found.size, found.colour, found.shape, motion, style, background]
    absent = [torch.full_like(motion, -1)] * len(OBJECT_FIELDS)
    nothing = torch.full_like(velocity[:, 0], torch.nan)
    return Reading(
        attributes=torch.stack(columns + absent, 1),
        world_psnr=_psnr(found.error),
        jitter=jitter,
        velocity=torch.stack([velocity, torch.full_like(velocity, torch.nan)], 1),
        displacement=torch.stack([velocity.norm(dim=1), nothing], 1),
        angle_error=torch.stack([angle(velocity, motion), nothing], 1),
        colour_drift=found.colour_drift,
        area_drift=found.area_drift,
    )


def _two(found: TwoObjects, style: Tensor, background: Tensor) -> Reading:
    """The object behind is the first one, as in a prompt."""
    order = torch.stack([1 - found.front, found.front], 1)
    rows = torch.arange(len(order), device=order.device)[:, None]
    size, colour, shape = (value[rows, order] for value in (found.size, found.colour, found.shape))
    centroid, trust = found.centroid[rows, order], found.trust[rows, order]
    lines = [fit_line(centroid[:, k], trust[:, k] + 1e-6) for k in (0, 1)]
    velocity = torch.stack([line[0] for line in lines], 1)
    motion = torch.stack([motion_of(velocity[:, k], STILL) for k in (0, 1)], 1)
    things = torch.stack([size, colour, shape, motion], -1)  # [B, 2, 4]
    return Reading(
        attributes=torch.cat([things[:, 0], style[:, None], background[:, None], things[:, 1]], 1),
        world_psnr=_psnr(found.error),
        jitter=torch.stack([line[1] for line in lines], 1).mean(1),
        velocity=velocity,
        displacement=velocity.norm(dim=2),
        angle_error=torch.stack([angle(velocity[:, k], motion[:, k]) for k in (0, 1)], 1),
        colour_drift=found.colour_drift,
        area_drift=found.area_drift,
    )


def _psnr(error: Tensor) -> Tensor:
    return -10 * torch.log10(error.clamp(min=1e-9))


def _mse(psnr: Tensor) -> Tensor:
    return 10 ** (-psnr / 10)
