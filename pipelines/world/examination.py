"""Examining a model on fixed prompts: one object, two objects, held-out triples, at every size it was trained for.

Notable choices
- All clips of one size are sampled together in batches of the training's size, the last one filled up, so that a
  compiled network sees no new shape.
- A prompt's seeds are not independent evidence: beside Wilson's interval over clips stands a bootstrap over prompts.
- Real clips of the same prompts are the upper bound.

P prompts, R seeds of each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.statistics import bootstrap_ci
from foveal.pipelines.world.evaluation import NOISE_SEED, summarise
from foveal.pipelines.world.flow import sample, seeded_noise
from foveal.pipelines.world.models import ModelSpec
from foveal.pipelines.world.prompts import validation_prompts
from foveal.pipelines.world.reader import read, score
from foveal.pipelines.world.render import render
from foveal.pipelines.world.vocabulary import attributes_of, parse, word_ids

GROUPS: dict[str, tuple[int, bool]] = {  # objects, held-out triples
    "one": (1, False),
    "two": (2, False),
    "one, held out": (1, True),
    "two, held out": (2, True),
}
HELD_OUT_MOST = 36


@dataclass(frozen=True, slots=True)
class Paper:
    """One examination: which groups, how many prompts of each (held-out ones at most 36), how many seeds a prompt."""

    groups: tuple[str, ...]
    prompts: int = 64
    seeds: int = 1
    steps: int = 8

    def of(self, group: str) -> list[str]:
        """The prompts of a group, one after the other."""
        objects, held_out = GROUPS[group]
        n = min(self.prompts, HELD_OUT_MOST) if held_out else self.prompts
        return validation_prompts(n, held_out, objects)


def examine(
    model: nn.Module, text: nn.Module, spec: ModelSpec, paper: Paper, size: int, batch: int, bf16: bool = False
) -> list[dict[str, Any]]:
    """One row of facts a group: group, size, steps, prompts, seeds and `summarise`'s rates, with two intervals."""
    prompts = [prompt for group in paper.groups for prompt in paper.of(group) for _ in range(paper.seeds)]
    seeds = [
        NOISE_SEED + k * 10_000 + i for g in paper.groups for i in range(len(paper.of(g))) for k in range(paper.seeds)
    ]
    frames = _sample(model, text, spec, prompts, seeds, paper.steps, size, batch, bf16)
    return _rows(paper, size, frames, prompts)


def examine_real(spec: ModelSpec, paper: Paper, size: int, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """The same rows for rendered clips of the same prompts: what a perfect model would get."""
    prompts = [prompt for group in paper.groups for prompt in paper.of(group) for _ in range(paper.seeds)]
    attributes = attributes_of([parse(prompt) for prompt in prompts], device)
    frames = render(attributes, spec.frames, size, torch.Generator().manual_seed(NOISE_SEED), spec.world)
    return _rows(paper, size, frames, prompts)


def missed(spec: ModelSpec, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The gates that these rows do not reach, in words; a gate without a row is not reached."""
    out = []
    for group, metric, least in spec.gates:
        found = [row[metric] for row in rows if row["group"] == group and row["size"] == spec.size]
        if not found or found[0] < least:
            out.append(f"{group}: {metric} {found[0] if found else 'not measured'}, needed {least}")
    return out


def _sample(
    model: nn.Module, text: nn.Module, spec: ModelSpec, prompts: list[str], seeds: list[int],
    steps: int, size: int, batch: int, bf16: bool,
) -> Tensor:  # fmt: skip
    device = next(model.parameters()).device
    ids = word_ids(attributes_of([parse(prompt) for prompt in prompts], device))
    parts = []
    for start in range(0, len(ids), batch):
        rows = [min(i, len(ids) - 1) for i in range(start, start + batch)]
        noise = seeded_noise([seeds[i] for i in rows], *spec.latents(size)).to(device)
        clips = sample(model, text, ids[rows], noise, steps=steps, shift=spec.sizes[size], bf16=bf16)
        parts.append(clips[: len(ids) - start])
    return torch.cat(parts)


def _rows(paper: Paper, size: int, frames: Tensor, prompts: list[str]) -> list[dict[str, Any]]:
    out, start = [], 0
    for group in paper.groups:
        n = len(paper.of(group)) * paper.seeds
        scenes = [parse(prompt) for prompt in prompts[start : start + n]]
        reading = read(frames[start : start + n])
        facts = summarise(reading, scenes)
        right = score(reading, scenes)["acc_all"].view(-1, paper.seeds).tolist()
        found = bootstrap_ci(right, seed=0) if len(right) > 1 else None
        facts["acc_all_prompts_ci95"] = [round(x, 4) for x in found.to_list()] if found else None
        out.append(
            {"group": group, "size": size, "steps": paper.steps, "guidance": 1.0, "prompts": len(right),
             "seeds": paper.seeds, **facts}
        )  # fmt: skip
        start += n
    return out
