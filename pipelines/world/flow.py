"""Flow matching: noise levels, noise, the training target and a plain Euler sampler.

Convention of Wan and Flux: x_sigma = (1 - sigma) x0 + sigma eps, target velocity v = eps - x0, timestep = 1000 sigma.

Notable choices
- `sample` needs neither diffusers nor a pipeline: the training machine has none. `WorldPipeline` does the same thing
  through diffusers' scheduler, and a test holds the two together.
- Noise is drawn on the CPU, one generator per sample, so a sample depends on its own seed and never on its batch.

B clips, T frames, S height = width; latents are [B, 3, T, S, S] in about [-1, 1], frames [B, T, 3, S, S] in [0, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def to_latents(frames: Tensor) -> Tensor:
    """[B, T, 3, S, S] in [0, 1] -> [B, 3, T, S, S] in [-1, 1]"""
    return (2 * frames - 1).transpose(1, 2)


def to_frames(latents: Tensor) -> Tensor:
    """[B, 3, T, S, S] -> [B, T, 3, S, S] fp32, clamped to [0, 1]"""
    return (latents.float().clamp(-1, 1).transpose(1, 2) + 1) / 2


def shifted(t: Tensor, shift: float) -> Tensor:
    """sigma = s t / (1 + (s - 1) t): s > 1 spends more of [0, 1] at high noise."""
    return shift * t / (1 + (shift - 1) * t)


def sigma_schedule(steps: int, shift: float) -> list[float]:
    """`steps + 1` noise levels from 1 to 0, computed in fp64."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def draw_sigmas(batch: int, shift: float, high: float, generator: torch.Generator) -> Tensor:
    """Noise levels for training: shifted logit-normal(0, 1), and a fraction `high` of them from U(.9, 1).  -> [B]

    The high-noise share is there because this world's large flat objects decide their motion above sigma = .9.
    """
    device = generator.device
    sigma = shifted(torch.sigmoid(torch.randn(batch, generator=generator, device=device)), shift)
    noisy = 0.9 + 0.1 * torch.rand(batch, generator=generator, device=device)
    return torch.where(torch.rand(batch, generator=generator, device=device) < high, noisy, sigma)


def seeded_noise(seeds: Sequence[int], *shape: int) -> Tensor:
    """Standard normal noise on the CPU, sample b of that shape from `seeds[b]` alone.  -> [B, *shape] fp32"""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def euler(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    text: nn.Module,
    ids: Tensor,
    noise: Tensor,
    *,
    steps: int,
    shift: float,
    guidance: float = 1.0,
    bf16: bool = False,
    clock: float = 1.0,
) -> Tensor:
    """Euler sampling from noise [B, ...] and word ids [B, L].  -> latents, the shape of noise

    network(x, time [B], encoding) gives the velocity; its time is sigma x `clock`. `bf16` runs it under autocast. Guidance 1
    costs one forward a step, anything else two.
    """
    x, sigma = noise, sigma_schedule(steps, shift)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        cond, null = text(ids), text(torch.zeros_like(ids))
        for i in range(steps):
            time = torch.full((len(ids),), sigma[i] * clock, device=x.device)
            v = network(x, time, cond).float()
            if guidance != 1:
                v_null = network(x, time, null).float()
                v = v_null + guidance * (v - v_null)
            x = x + (sigma[i + 1] - sigma[i]) * v
    return x


def sample(model: nn.Module, text: nn.Module, ids: Tensor, noise: Tensor, **settings: Any) -> Tensor:
    """`euler` with its settings.  ids [B, 10], noise [B, 3, T, S, S] -> frames [B, T, 3, S, S] in [0, 1]"""
    return to_frames(euler(partial(velocity, model), text, ids, noise, clock=1000, **settings))


def velocity(model: nn.Module, x: Tensor, timestep: Tensor, encoding: Tensor) -> Tensor:
    """One call of a Wan-like transformer (stock or twin).  -> the shape of x"""
    return model(hidden_states=x, timestep=timestep, encoder_hidden_states=encoding, return_dict=False)[0]
