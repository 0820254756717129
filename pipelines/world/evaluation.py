"""Judging a model of the world with the exact reader, and real clips as the upper bound.

Notable choices
- Scenes and noise are the same for every model, step count and moment of training, so differences are paired.
- Rates come with Wilson intervals: "1.0" over 128 prompts still means only "above .97".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.statistics import wilson
from foveal.pipelines.world.flow import sample, seeded_noise, sigma_schedule, velocity
from foveal.pipelines.world.models import ModelSpec, build_transformer
from foveal.pipelines.world.prompts import draw_attributes
from foveal.pipelines.world.reader import STILL, Reading, direction_error, read, score
from foveal.pipelines.world.render import render
from foveal.pipelines.world.text import TextTable
from foveal.pipelines.world.vocabulary import Scene, scenes_of, word_ids

SCENE_SEED = 77  # held-out scenes use the next one
NOISE_SEED = 1000
FORWARD_PROMPT = "a large blue ring standing still on a black plain background"


def summarise(reading: Reading, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Means over clips: acc_*, acc_all's interval, world_psnr (dB), jitter, angle_error (degrees, moving objects),
    displacement (of moving objects), all rounded."""
    rates = {name: value.mean().item() for name, value in score(reading, scenes).items()}
    interval = wilson(rates["acc_all"] * len(scenes), len(scenes))
    return {
        "n": len(scenes),
        **{name: round(value, 4) for name, value in rates.items()},
        "acc_all_ci95": [round(end, 4) for end in interval.to_list()],
        "world_psnr": round(reading.world_psnr.mean().item(), 2),
        "jitter": round(reading.jitter.mean().item(), 5),
        "angle_error": round(direction_error(reading, scenes).nanmean().item(), 3),
        "displacement": round(reading.displacement[reading.displacement > STILL].mean().item(), 4),
    }


def evaluate(
    model: nn.Module,
    text: nn.Module,
    spec: ModelSpec,
    *,
    n: int,
    steps: int,
    guidance: float = 1.0,
    held_out: bool = False,
    batch: int = 128,
    bf16: bool = False,
) -> dict[str, Any]:
    """Sample n random scenes (of seen triples, or of held-out ones) and read them.  -> `summarise`'s facts"""
    device = next(model.parameters()).device
    attributes = draw_attributes(n, torch.Generator().manual_seed(SCENE_SEED + held_out), held_out)
    parts = []
    for start in range(0, n, batch):
        chunk = attributes[start : start + batch]
        seeds = range(NOISE_SEED + start, NOISE_SEED + start + len(chunk))
        noise = seeded_noise(seeds, *spec.latents(spec.size)).to(device)
        ids = word_ids(chunk).to(device)
        parts.append(
            sample(model, text, ids, noise, steps=steps, shift=spec.shift, guidance=guidance, bf16=bf16),
        )
    facts = summarise(read(torch.cat(parts)), scenes_of(attributes))
    return {"steps": steps, "guidance": guidance, "held_out": held_out, **facts}


def evaluate_real(spec: ModelSpec, n: int = 256, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Rendered clips of random scenes: what a perfect model would score."""
    attributes = draw_attributes(n, torch.Generator().manual_seed(SCENE_SEED))
    frames = render(
        attributes.to(device), spec.frames, spec.size, torch.Generator().manual_seed(NOISE_SEED), spec.world
    )
    return summarise(read(frames), scenes_of(attributes))


@torch.no_grad()
def forward_facts(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[str, Any]:
    """One forward of the exported (fp16) weights, in fp32 on a CPU: numbers that anyone can compute again.

    Noise of seed 0, 4 frames of 16 x 16, third of `steps` noise levels, `FORWARD_PROMPT`.
    """
    half = {name: value.detach().cpu().half().float() for name, value in weights.items()}
    model, text = build_transformer(spec.transformer, "twin"), TextTable(spec.transformer["text_dim"])
    for module, prefix in ((model, "model."), (text, "text.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in half.items() if k.startswith(prefix)})
    x = torch.randn(1, spec.transformer["in_channels"], 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = sigma_schedule(spec.steps, spec.sizes.get(16, spec.shift))[3]
    v = velocity(model, x, torch.tensor([1000 * sigma]), text.encode([FORWARD_PROMPT]))
    first = [round(value, 6) for value in v.flatten()[:5].tolist()]
    return {
        "prompt": FORWARD_PROMPT,
        "first": first,
        "mean": round(v.mean().item(), 6),
        "std": round(v.std().item(), 6),
    }
