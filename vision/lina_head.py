"""LINA's head: a small network that turns noise into one token's latent, given what the trunk says about that token.

Letters: P tokens of any number of images, W numbers of a latent token, D width; sigma in [0, 1], 1 is noise.
Convention: ``x_sigma = sigma noise + (1 - sigma) token``, velocity ``v = noise - token``.
Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens".

Notable choices
- What depends on the trunk alone is computed once (``condition``) and serves all steps of a token's path.
- Modulations and the last layer begin at zero, so that a fresh head says 0.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.vision.lina_config import LinaConfig
from foveal.vision.lina_parts import TimeEmbed

TIMES = 1000.0
LAST = 1e-3  # noise level before 0


def plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class HeadBlock(nn.Module):
    """``h + g norm(fc2(silu(fc1(norm0(h) (1 + s) + b))))`` with (s, b, g) from the condition."""

    def __init__(self, dim: int, dd: dict[str, Any]):
        super().__init__()
        self.modulation = nn.Linear(dim, 3 * dim, **dd)
        self.fc1, self.fc2 = nn.Linear(dim, dim, **dd), nn.Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        s, b, g = self.modulation(condition).chunk(3, -1)
        return h + g * self.norm(self.fc2(F.silu(self.fc1(plain_norm(h) * (1 + s) + b))))


class FlowHead(nn.Module):
    """Velocity of a latent token."""

    def __init__(self, config: LinaConfig, dd: dict[str, Any]):
        super().__init__()
        dim, width = config.dim, config.token_width
        self.embed = nn.Linear(width, dim, **dd)
        self.time = TimeEmbed(dim, dd)
        self.fc1, self.fc2 = nn.Linear(dim, dim, **dd), nn.Linear(dim, dim, **dd)
        self.blocks = nn.ModuleList(HeadBlock(dim, dd) for _ in range(config.head_depth))
        self.modulation = nn.Linear(dim, 2 * dim, **dd)
        self.out = nn.Linear(dim, width, **dd)

    def condition(self, z: Tensor) -> Tensor:
        """What the trunk says, [..., D] -> [..., D]: the part that does not depend on the noise level."""
        return self.fc2(F.silu(self.fc1(z)))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """x [..., W], sigma [...] or 0-d, condition [..., D] (of ``condition``) -> velocity [..., W]"""
        c = F.silu(condition + self.time(TIMES * sigma))
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, c)
        s, b = self.modulation(c).chunk(2, -1)
        return self.out(plain_norm(h) * (1 + s) + b)


def noise_levels(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 levels from 1 to 0: evenly from 1 to 0.001, then 0. shift above 1 spends more steps on high noise."""
    if steps < 1:
        raise ValueError(f"the number of diffusion steps is {steps}; at least 1 is needed.")
    if shift <= 0:
        raise ValueError(f"shift is {shift}; a positive number is needed, 1 for none.")
    even = torch.linspace(1, LAST, steps, dtype=torch.float64)
    return [*(shift * even / (1 + (shift - 1) * even)).tolist(), 0.0]


def denoise(
    head: FlowHead, z: Tensor, noise: Tensor, steps: int, *, z_null: Tensor | None = None, guidance: float = 1.0, shift: float = 1.0
) -> Tensor:  # fmt: skip
    """Euler's method from noise to tokens.  z [P, D], noise [P, W] -> [P, W] fp32

    z_null: the trunk's word without a condition; the velocity is then ``v_null + guidance (v - v_null)``.
    """
    levels, u = noise_levels(steps, shift), noise.float()
    condition = head.condition(z if z_null is None else torch.cat([z, z_null]))
    sigma = torch.tensor(levels, device=u.device, dtype=torch.float32)
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        x = u.to(condition.dtype)
        v = head(x if z_null is None else torch.cat([x, x]), sigma[i], condition).float()
        if z_null is not None:
            given, without = v.chunk(2)
            v = without + guidance * (given - without)
        u = u + (following - level) * v
    return u
