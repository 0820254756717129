"""What LINA is made of beside its attention and its head: blocks, positions, conditions, and the connector.

Letters: B batch, N tokens, M query tokens, D width, T text tokens.
Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens".

Notable choices
- Norms stand after the branch, inside the residual: ``x + norm(branch(x))``.
- The queries' time embedding is that of time 0, a constant for images; it and the affine part of the labels' norm are not trained.
- Of the order of the sinusoid's halves nothing is published; cosine first, as in the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.vision.lina_attention import LinearAttention
from foveal.vision.lina_config import LinaConfig

FREQUENCIES = 256
BASE = 10_000.0


class Mlp(nn.Module):
    """D -> 4 D -> D with exact GELU."""

    def __init__(self, dim: int, dd: dict[str, Any]):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim, **dd), nn.Linear(4 * dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``. decoder: with the gates and the convolution."""

    def __init__(self, config: LinaConfig, dd: dict[str, Any], decoder: bool = False):
        super().__init__()
        own: dict[str, Any] = {
            "gate": config.kv_gate, "tokens": config.queries + config.tokens, "per_head": config.per_head,
            "prefix": config.queries, "conv": config.conv,
        }  # fmt: skip
        self.norm1, self.norm2 = nn.LayerNorm(config.dim, **dd), nn.LayerNorm(config.dim, **dd)
        self.attn = LinearAttention(
            config.dim,
            config.heads,
            normalisation=config.normalisation,
            eps=config.eps,
            **(own if decoder else {}),
            **dd,
        )
        self.mlp = Mlp(config.dim, dd)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], key_mask [B, N] bool -> [B, N, D]"""
        x = x + self.norm1(self.attn(x, key_mask=key_mask))
        return x + self.norm2(self.mlp(x))


def positions(grid: int, dim: int, device: Any = None) -> Tensor:
    """[1, grid ** 2, dim]: sine and cosine of the column, then of the row, in raster order, fp32."""
    frequency = BASE ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    angle = torch.arange(grid, device=device, dtype=torch.float32)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], 1)
    columns, rows = one[None].expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1)[None]


def sinusoid(time: Tensor) -> Tensor:
    """[...] -> [..., 256], cosine first, fp32"""
    half = FREQUENCIES // 2
    frequency = BASE ** -(torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angle = time.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeEmbed(nn.Module):
    """Time [...] -> [..., D]"""

    def __init__(self, dim: int, dd: dict[str, Any]):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(FREQUENCIES, dim, **dd), nn.Linear(dim, dim, **dd)

    def forward(self, time: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(sinusoid(time).to(self.fc1.weight.dtype))))


class LabelEmbed(nn.Module):
    """Classes [B] -> one token each, [B, 1, D]. The last row of the table means "no class"."""

    def __init__(self, classes: int, dim: int, dd: dict[str, Any]):
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.empty(classes + 1, dim, **dd))
        self.norm = nn.LayerNorm(dim, **dd).requires_grad_(False)

    def forward(self, labels: Tensor) -> Tensor:
        return self.norm(self.weight[labels])[:, None]

    def null(self, batch: int, device: Any) -> Tensor:
        """Labels that mean "no class"."""
        return torch.full((batch,), self.classes, device=device)


class TextEmbed(nn.Module):
    """States of a language model -> condition tokens [B, T, D]. A fixed table stands for positions without a word."""

    def __init__(self, config: LinaConfig, dd: dict[str, Any]):
        super().__init__()
        assert config.text_dim is not None
        self.tokens = config.text_tokens
        self.proj, self.norm = nn.Linear(config.text_dim, config.dim, **dd), nn.LayerNorm(config.dim, **dd)
        self.weight: Tensor
        self.register_buffer("weight", torch.empty(config.text_table, config.text_dim, **dd))

    def forward(self, states: Tensor, words: Tensor | None = None) -> Tensor:
        """states [B, L, text_dim], L at most T; words [B, L] bool, False where there is no word."""
        b, length, width = states.shape
        if length > self.tokens or width != self.weight.shape[1]:
            raise ValueError(
                f"text states are {tuple(states.shape)}; at most {self.tokens} positions of width {self.weight.shape[1]} fit."
            )
        table = self.weight[: self.tokens].to(states.dtype).expand(b, -1, -1)
        given = states if words is None else torch.where(words[..., None], states, table[:, :length])
        return self.norm(self.proj(torch.cat([given, table[:, length:]], 1)))

    def null(self, batch: int, device: Any) -> Tensor:
        """States without a position: every one is the table's."""
        return torch.zeros(batch, 0, self.weight.shape[1], device=device, dtype=self.weight.dtype)


class Connector(nn.Module):
    """Condition tokens -> M query tokens: ``[condition ; queries]`` through blocks, of which the queries are kept."""

    def __init__(self, config: LinaConfig, dd: dict[str, Any]):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, config.dim, **dd))
        self.blocks = nn.ModuleList(Block(config, dd) for _ in range(config.connector_depth))
        self.norm = nn.LayerNorm(config.dim, **dd)
        self.queries = config.queries
        if config.video:
            edge = 2 * config.patch
            self.patch_embed = nn.Conv2d(config.channels, config.dim, edge, stride=edge, **dd)  # of earlier frames
            self.time = TimeEmbed(config.dim, dd).requires_grad_(False)
            self.time_norm = nn.LayerNorm(config.dim, **dd).requires_grad_(False)
        self.video = config.video

    def forward(self, condition: Tensor, position: Tensor) -> Tensor:
        """condition [B, T, D], position [1, M, D] -> [B, M, D]"""
        queries = self.query + position
        if self.video:
            queries = queries + self.time_norm(self.time(torch.zeros(1, 1, device=condition.device)))
        x = torch.cat([condition, queries.to(condition.dtype).expand(len(condition), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, -self.queries :]
