"""A plain-torch twin of diffusers' `FluxTransformer2DModel`: same parameter names, same arithmetic, no dependency.

Notable choices
- It exists for machines that have torch and nothing else, and as a readable reference. A test holds it to the stock
  class at 1e-5.
- Only what the emoji model uses: no guidance embedding, no control nets, no adapters.
- Under autocast the noise level stays fp32; stock code rounds it to the activations' type.

B samples, N image tokens, L text tokens, H heads, D = 64 H model width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.pipelines.world.twin import FeedForward, RMSNorm, Rotation, gelu_tanh, rotate

EPS = 1e-6
TIME_CHANNELS = 256


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm, then x (1 + scale) + shift.  x [B, N, D], shift and scale [B, D]"""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def rotation(ids: Tensor, axes: tuple[int, ...]) -> Rotation:
    """Angles of token ids [N, 3], a part of the head for each axis.  -> cos, sin, each [1, N, 1, 32]"""
    parts = []
    for axis, width in enumerate(axes):
        frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width)
        parts.append(torch.outer(ids[:, axis].double(), frequency))
    angles = torch.cat(parts, 1)[None, :, None]
    return angles.cos().float(), angles.sin().float()


class Modulation(nn.Module):
    """`parts` vectors of width D from the conditioning."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition)).chunk(self.parts, 1)


class Attention(nn.Module):
    """Projections of one attention layer; `added` ones for the text stream of a double block."""

    def __init__(self, dim: int, heads: int, added: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        if added:
            self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
            self.norm_added_q, self.norm_added_k = RMSNorm(dim // heads), RMSNorm(dim // heads)
            self.add_q_proj, self.add_k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.add_v_proj, self.to_add_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def image(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of the main stream, each [B, N, H, 64]"""
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def text(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)) for layer in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v


def prepared(q: Tensor, k: Tensor, v: Tensor, rope: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated and in the order that attention takes.  three [B, N, H, 64] -> three [B, H, N, 64]"""
    q, k = rotate(q, *rope), rotate(k, *rope)
    return q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2)


@torch.compiler.disable
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outside compiled graphs: with it inside, the first backward of 264 tokens failed on an H100 under torch 2.11."""
    return F.scaled_dot_product_attention(q, k, v)


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, joined in attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = Attention(dim, heads, added=True)
        self.ff, self.ff_context = FeedForward(dim, 4 * dim), FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, rope: Rotation) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(condition)
        text_parts = self.norm1_context(condition)
        own, other = self.attn.image(modulated(x, shift, scale)), self.attn.text(modulated(text, *text_parts[:2]))
        q, k, v = (torch.cat(pair, 1) for pair in zip(other, own, strict=True))
        out = attention(*prepared(q, k, v, rope)).transpose(1, 2).flatten(2)
        from_text, from_image = out.split([text.shape[1], x.shape[1]], 1)
        x = x + gate[:, None] * self.attn.to_out[0](from_image)
        x = x + gate_ff[:, None] * self.ff(modulated(x, shift_ff, scale_ff))
        text = text + text_parts[2][:, None] * self.attn.to_add_out(from_text)
        text = text + text_parts[5][:, None] * self.ff_context(modulated(text, *text_parts[3:5]))
        return x, text


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and feed-forward side by side."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.proj_mlp, self.proj_out = nn.Linear(dim, 4 * dim), nn.Linear(5 * dim, dim)
        self.attn = Attention(dim, heads, added=False)

    def forward(self, x: Tensor, condition: Tensor, rope: Rotation) -> Tensor:
        shift, scale, gate = self.norm(condition)
        h = modulated(x, shift, scale)
        q, k, v = self.attn.image(h)
        out = attention(*prepared(q, k, v, rope)).transpose(1, 2).flatten(2)
        both = torch.cat([out, gelu_tanh(self.proj_mlp(h))], 2)
        return x + gate[:, None] * self.proj_out(both)


class TwoLayers(nn.Module):
    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeAndText(nn.Module):
    """Noise level and pooled prompt as one conditioning vector."""

    def __init__(self, dim: int, pooled: int) -> None:
        super().__init__()
        self.timestep_embedder, self.text_embedder = TwoLayers(TIME_CHANNELS, dim), TwoLayers(pooled, dim)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        half = TIME_CHANNELS // 2
        ramp = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        angle = timestep.float()[:, None] * 1000 * torch.exp(-math.log(10000.0) * ramp)
        wave = torch.cat([angle.cos(), angle.sin()], 1).to(pooled.dtype)
        return self.timestep_embedder(wave) + self.text_embedder(pooled)


class FluxTwin(nn.Module):
    """Constructor arguments and parameter names of the stock class.

    hidden_states [B, N, in_channels], encoder_hidden_states [B, L, joint_attention_dim], pooled_projections [B, pooled],
    timestep [B] in [0, 1], img_ids [N, 3], txt_ids [L, 3] -> (output,) of the shape of hidden_states
    """

    def __init__(
        self,
        in_channels: int,
        num_layers: int,
        num_single_layers: int,
        attention_head_dim: int,
        num_attention_heads: int,
        joint_attention_dim: int,
        pooled_projection_dim: int,
        axes_dims_rope: tuple[int, ...],
        guidance_embeds: bool = False,
    ) -> None:
        super().__init__()
        if guidance_embeds:
            raise ValueError("guidance_embeds is True: the twin has none, use False.")
        dim, heads = num_attention_heads * attention_head_dim, num_attention_heads
        self.axes = tuple(axes_dims_rope)
        self.time_text_embed = TimeAndText(dim, pooled_projection_dim)
        self.context_embedder, self.x_embedder = nn.Linear(joint_attention_dim, dim), nn.Linear(in_channels, dim)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(dim, heads) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(dim, heads) for _ in range(num_single_layers)])
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        x, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        condition = self.time_text_embed(timestep, pooled_projections)
        rope = rotation(torch.cat([txt_ids, img_ids]), self.axes)
        for block in self.transformer_blocks:
            x, text = block(x, text, condition, rope)
        length = text.shape[1]
        x = torch.cat([text, x], 1)
        for block in self.single_transformer_blocks:
            x = block(x, condition, rope)
        scale, shift = self.norm_out(condition)
        return (self.proj_out(modulated(x[:, length:], shift, scale)),)
