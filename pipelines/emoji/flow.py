"""Pixels as Flux tokens, one network call, and the plain Euler sampler of the world's models on them.

Convention of Flux: x_sigma = (1 - sigma) x0 + sigma eps, velocity v = eps - x0, the network is given sigma in [0, 1].

Notable choices
- `sample` needs neither diffusers nor a pipeline: the training machine has none. `EmojiPipeline` does the same thing
  through diffusers' scheduler, and a test holds the two together.
- Noise is drawn on the CPU, one generator per sample, so a sample depends on its own seed and never on its batch.

B samples, S height = width, N = (S / 4)^2 tokens of 48 numbers (channel, row, column); latents [B, 3, S, S] in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.emoji.models import PATCH
from foveal.pipelines.emoji.text import pooled
from foveal.pipelines.emoji.vocabulary import N_SLOTS
from foveal.pipelines.world import flow as world_flow


def to_latents(images: Tensor) -> Tensor:
    """[B, 3, S, S] in [0, 1] -> the same in [-1, 1]"""
    return 2 * images - 1


def to_images(latents: Tensor) -> Tensor:
    """[B, 3, S, S] -> fp32, clamped to [0, 1]"""
    return (latents.float().clamp(-1, 1) + 1) / 2


def pack(latents: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, N, 48]"""
    b, c, height, width = latents.shape
    x = latents.reshape(b, c, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH * PATCH)


def unpack(tokens: Tensor) -> Tensor:
    """[B, N, 48] of a square image -> [B, 3, S, S]"""
    b, n, width = tokens.shape
    edge, c = round(n**0.5), width // PATCH**2
    x = tokens.reshape(b, edge, edge, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, edge * PATCH, edge * PATCH)


@lru_cache(maxsize=16)
def token_ids(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids of the image tokens, (0, row, column), and of the text slots, zeros.  -> [N, 3], [8, 3], fp32"""
    edge = size // PATCH
    at = torch.arange(edge, device=device)
    rows = torch.stack([torch.zeros(edge, edge, device=device), *torch.meshgrid(at, at, indexing="ij")], 2)
    return rows.reshape(-1, 3).float(), torch.zeros(N_SLOTS, 3, device=device)


def velocity(model: nn.Module, x: Tensor, sigma: Tensor, encoding: Tensor) -> Tensor:
    """One call of a Flux-like transformer.  x [B, 3, S, S], sigma [B], encoding [B, 8, 64] -> the shape of x"""
    img_ids, txt_ids = token_ids(x.shape[-1], x.device)
    out = model(
        hidden_states=pack(x),
        encoder_hidden_states=encoding,
        pooled_projections=pooled(encoding),
        timestep=sigma,
        img_ids=img_ids,
        txt_ids=txt_ids,
        return_dict=False,
    )
    return unpack(out[0])


def seeded_noise(seeds: Sequence[int], size: int) -> Tensor:
    """Standard normal noise on the CPU, sample b from `seeds[b]` alone.  -> [B, 3, S, S] fp32"""
    return world_flow.seeded_noise(seeds, 3, size, size)


def sample(model: nn.Module, text: nn.Module, ids: Tensor, noise: Tensor, **settings: Any) -> Tensor:
    """`euler` with its settings.  ids [B, 8], noise [B, 3, S, S] -> images [B, 3, S, S] in [0, 1]"""
    return to_images(world_flow.euler(partial(velocity, model), text, ids, noise, **settings))
