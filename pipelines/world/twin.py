"""A plain-torch twin of diffusers' `WanTransformer3DModel`: same parameter names, same arithmetic, no dependency.

Notable choices
- It exists for machines that have torch and nothing else, and as a readable reference. A test holds it to the stock
  class at 1e-5, with one timestep per sample and with one per token.
- Only what the world's models use: text conditioning, RMS norm across heads, affine norm before cross-attention. No
  image conditioning, no context parallelism, no hooks.
- The patch convolution is a matrix product on unfolded pixels (kernel = stride makes them equal), which compiles
  better.

B clips, N tokens, L text slots, H heads, D = H·64 model width, (T, Y, X) token grid
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
Rotation = tuple[Tensor, Tensor]  # cos, sin, each [1, N, 1, 32]


def layer_norm(x: Tensor, affine: nn.LayerNorm | None = None) -> Tensor:
    """Layer norm in fp32, returned in fp32."""
    weight, bias = (affine.weight.float(), affine.bias.float()) if affine is not None else (None, None)
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, EPS)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent pairs.  x [B, N, H, 64]"""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


@lru_cache(maxsize=16)
def rotation(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Rotation:
    """Angles of a token grid: the head is split into a part for time, rows and columns."""
    space = 2 * (head_dim // 6)
    parts = []
    for axis, width in enumerate((head_dim - 2 * space, space, space)):
        frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(torch.arange(grid[axis], dtype=torch.float64), frequency)
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        parts.append(angle.view(shape).expand(*grid, -1))
    angles = torch.cat(parts, -1).reshape(1, -1, 1, head_dim // 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class RMSNorm(nn.Module):
    """RMS norm across all heads, in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * self.weight.float()).type_as(x)


class Attention(nn.Module):
    """Self-attention with rotation, or cross-attention to the text without."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None, rope: Rotation | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, v))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Projection(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last are modulated by the noise level."""

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(dim, heads), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.ffn = FeedForward(dim, hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, rope: Rotation) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulate(self.scale_shift_table, modulation.float())
        h = (layer_norm(x) * (1 + scale1) + shift1).type_as(x)
        x = (x.float() + self.attn1(h, None, rope) * gate1).type_as(x)
        x = x + self.attn2(layer_norm(x, self.norm2).type_as(x), context)
        h = (layer_norm(x) * (1 + scale2) + shift2).type_as(x)
        return (x.float() + self.ffn(h).float() * gate2).type_as(x)


def modulate(table: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
    """table [1, K, D] + modulation [B, K or 1, D] or [B, N, K or 1, D] -> K tensors [B, 1, D] or [B, N, D]"""
    total = table + modulation
    parts = total.chunk(table.shape[1], -2)
    return parts if total.ndim == 3 else tuple(part.squeeze(-2) for part in parts)


class TwoLayers(nn.Module):
    def __init__(self, inputs: int, dim: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1, self.linear_2, self.act = nn.Linear(inputs, dim), nn.Linear(dim, dim), act

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Noise level and text, brought to the model's width."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim, F.silu)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim, gelu_tanh)

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """timestep [B] or [B, N] -> embedding [..., D], modulation [..., 6, D], text [B, L, D]"""
        half = self.freq_dim // 2
        ramp = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        angle = timestep.float()[..., None] * torch.exp(-math.log(10000.0) * ramp)
        wave = torch.cat([angle.cos(), angle.sin()], -1).to(self.time_embedder.linear_1.weight.dtype)
        embedding = self.time_embedder(wave).type_as(text)
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1)), self.text_embedder(text)


class WanTwin(nn.Module):
    """Constructor arguments and parameter names of the stock class.

    hidden_states [B, C, frames, height, width], timestep [B] or [B, N], encoder_hidden_states [B, L, text_dim]
    -> (output,) of the shape of hidden_states
    """

    def __init__(
        self,
        patch_size: tuple[int, int, int],
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        out_channels: int,
        text_dim: int,
        freq_dim: int,
        ffn_dim: int,
        num_layers: int,
        rope_max_seq_len: int,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch_size, self.head_dim, self.rope_max_seq_len = patch_size, attention_head_dim, rope_max_seq_len
        self.patch_embedding = nn.Conv3d(in_channels, dim, self.patch_size, self.patch_size)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList([Block(dim, ffn_dim, num_attention_heads) for _ in range(num_layers)])
        self.proj_out = nn.Linear(dim, out_channels * math.prod(self.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        batch, channels, *extent = hidden_states.shape
        pt, ph, pw = self.patch_size
        grid = (extent[0] // pt, extent[1] // ph, extent[2] // pw)
        if max(grid) > self.rope_max_seq_len:
            raise ValueError(f"token grid {grid} exceeds rope_max_seq_len {self.rope_max_seq_len}: use a smaller clip.")
        patches = hidden_states.reshape(batch, channels, grid[0], pt, grid[1], ph, grid[2], pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, math.prod(grid), -1)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        embedding, modulation, context = self.condition_embedder(timestep, encoder_hidden_states)
        rope = rotation(grid, self.head_dim, x.device)
        for block in self.blocks:
            x = block(x, context, modulation, rope)
        shift, scale = modulate(self.scale_shift_table, embedding.unsqueeze(-2))
        x = self.proj_out((layer_norm(x) * (1 + scale) + shift).type_as(x))
        x = x.reshape(batch, *grid, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return (x.reshape(batch, -1, *extent),)
