"""Judging an emoji model with the exact reader, and rendered scenes as the upper bound.

Notable choices
- Prompts and noise are the same for every model, step count and moment of training, so differences are paired.
- Intervals are at the level of prompts: seeds of one prompt are not independent. Rates get a Wilson interval that counts
  prompts, emoji_psnr a bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.emoji.flow import sample, seeded_noise
from foveal.pipelines.emoji.models import EmojiSpec
from foveal.pipelines.emoji.reader import read, score
from foveal.pipelines.emoji.render import render
from foveal.pipelines.emoji.scenes import draw_attributes, draw_positions
from foveal.pipelines.emoji.vocabulary import scenes_of, word_ids
from foveal.pipelines.statistics import wilson

SCENE_SEED = 77  # held-out scenes use the next one
NOISE_SEED = 1000
BATCHES = {64: 256, 128: 128, 256: 32}  # images sampled at once
RESAMPLES = 1000


def validation_attributes(n: int = 64, held_out: bool = False) -> Tensor:
    """The first n of a fixed list of scenes, half of them with two pictures.  -> [n, 7]"""
    generator = torch.Generator().manual_seed(SCENE_SEED + held_out)
    rows = [draw_attributes(1, generator, held_out, pairs=float(i % 2)) for i in range(n)]
    return torch.cat(rows)


def validation_prompts(n: int = 64, held_out: bool = False) -> list[str]:
    """The prompts of `validation_attributes`."""
    return [scene.prompt for scene in scenes_of(validation_attributes(n, held_out))]


def summarise(images: Tensor, attributes: Tensor, seeds: int) -> dict[str, Any]:
    """Means and prompt-level 95 % intervals.  images [n x seeds, 3, S, S], seeds of one prompt side by side; attributes
    [n, 7]"""
    n = len(attributes)
    reading = read(images)
    scores = score(reading, scenes_of(attributes.repeat_interleave(seeds, 0)))
    rates = {name: value.nanmean().item() for name, value in scores.items()}
    psnr = reading.emoji_psnr.view(n, seeds).mean(1)
    return {
        "prompts": n,
        "seeds": seeds,
        **{name: round(value, 4) for name, value in rates.items()},
        "acc_all_ci95": _rounded(wilson(rates["acc_all"] * n, n).to_list()),
        "emoji_psnr": round(psnr.mean().item(), 2),
        "emoji_psnr_ci95": _rounded(_bootstrap(psnr.cpu())),
    }


def draw(
    model: nn.Module,
    text: nn.Module,
    spec: EmojiSpec,
    attributes: Tensor,
    size: int,
    *,
    seeds: int = 1,
    steps: int | None = None,
    guidance: float = 1.0,
    bf16: bool = False,
) -> Tensor:
    """Sample `seeds` images of each scene.  attributes [n, 7] -> [n x seeds, 3, S, S] in [0, 1]"""
    device = next(model.parameters()).device
    rows, parts = attributes.repeat_interleave(seeds, 0), []
    batch = next((b for s, b in BATCHES.items() if size <= s), 8)
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        noise = seeded_noise(range(NOISE_SEED + start, NOISE_SEED + start + len(chunk)), size).to(device)
        settings = {"steps": steps or spec.steps, "shift": spec.shift(size), "guidance": guidance, "bf16": bf16}
        parts.append(sample(model, text, word_ids(chunk, size).to(device), noise, **settings))
    return torch.cat(parts)


def evaluate(
    model: nn.Module,
    text: nn.Module,
    spec: EmojiSpec,
    *,
    size: int,
    n: int = 64,
    seeds: int = 4,
    steps: int | None = None,
    guidance: float = 1.0,
    held_out: bool = False,
    bf16: bool = False,
) -> dict[str, Any]:
    """Sample the validation scenes (of seen combinations, or of held-out ones) and read them.  -> `summarise`'s facts"""
    attributes = validation_attributes(n, held_out)
    settings: dict[str, Any] = {"steps": steps or spec.steps, "guidance": guidance}
    images = draw(model, text, spec, attributes, size, seeds=seeds, bf16=bf16, **settings)
    return {"size": size, **settings, "held_out": held_out, **summarise(images, attributes, seeds)}


def evaluate_real(size: int, n: int = 64, seeds: int = 4, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Rendered validation scenes: what a perfect model would score."""
    attributes = validation_attributes(n)
    rows = attributes.repeat_interleave(seeds, 0)
    positions = draw_positions(rows, torch.Generator().manual_seed(NOISE_SEED))
    images = [
        render(a.to(device), p.to(device), size) for a, p in zip(rows.split(32), positions.split(32), strict=True)
    ]
    return {"size": size, **summarise(torch.cat(images), attributes, seeds)}


def _bootstrap(values: Tensor) -> tuple[float, float]:
    """Percentile interval of the mean, resampling entries; the generator is fixed."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = values[index].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _rounded(interval: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in interval]
