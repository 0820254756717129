"""Exact read-outs of the procedural world: what the clip shows against what the prompt asked for. No network, no weights.

B samples.

Notable choices
- The reader's own scores under its own names: acc_* are 1 or 0 per sample, world_psnr needs no reference. With two
  objects asked for, an attribute is right if both have it; acc_both has a value for such prompts alone.
- A clip is read once: whoever computes several of these passes the reading along in `Meta`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.pipelines.metrics.metric import FunctionMetric, Meta
from foveal.pipelines.metrics.readings import accuracies
from foveal.pipelines.world.reader import Reading, direction_error, read, score
from foveal.pipelines.world.vocabulary import parse

ACCURACIES = {
    "acc_all": "every attribute of every object, and the scene, are as asked for",
    "acc_objects": "as many objects as asked for, every one right in all four attributes",
    "acc_count": "as many objects as asked for",
    "acc_colour": "colours as asked for",
    "acc_shape": "shapes as asked for",
    "acc_size": "sizes as asked for",
    "acc_motion": "motions as asked for",
    "acc_scene": "style and background as asked for",
}


def reading_of(gen: Tensor, meta: Meta) -> Reading:
    """The reading that came along, or a new one."""
    return meta.reading if meta.reading is not None else read(gen)


def _both(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
    """acc_all of prompts that name two objects, NaN for others."""
    assert meta.prompts is not None
    scenes = [parse(prompt) for prompt in meta.prompts]
    right = score(reading_of(gen, meta), scenes)["acc_all"]
    two = torch.tensor([scene.second is not None for scene in scenes], device=right.device)
    return torch.where(two, right, torch.nan)


def _angle(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
    assert meta.prompts is not None
    return direction_error(reading_of(gen, meta), [parse(prompt) for prompt in meta.prompts])


def _field(name: str) -> Callable[[Tensor, Tensor | None, Meta], Tensor]:
    return lambda gen, ref, meta: getattr(reading_of(gen, meta), name)


def _plain(name: str, higher: bool, summary: str, field: str | None = None) -> FunctionMetric:
    return FunctionMetric(name, "video", higher, _field(field or name), summary, ("world",))


METRICS = (
    _plain("world_psnr", True, "how well any clip of the world explains the sample, dB"),
    _plain("jitter", False, "distance of the object's path from a straight line, frame widths"),
    _plain("drift", False, "change of the object's colour over time", "colour_drift"),
    *accuracies(ACCURACIES, "world", reading_of, score, parse),
    FunctionMetric(
        "acc_both",
        "video",
        True,
        _both,
        "acc_all of the prompts that name two objects",
        ("world", "prompts"),
        proportion=True,
    ),
    FunctionMetric(
        "angle_error",
        "video",
        False,
        _angle,
        "degrees between the motion seen and the one asked for, moving objects",
        ("world", "prompts"),
    ),
)
