"""The operators in plain PyTorch: what they compute, and what runs where Triton cannot. Letters as in the operators' own files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.gated_linear.chunked import chunked
from foveal.kernels.token_mixing.block_parts import BlockSettings, BlockWeights
from foveal.kernels.token_mixing.dispatch import wide


def depthwise_conv(
    tokens: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None, silu: bool, dtype: torch.dtype
) -> Tensor:
    d, k = weight.shape[0], weight.shape[-1]
    maps = tokens.to(dtype).unflatten(1, grid).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(dtype)
    out = F.conv2d(maps, weight.to(dtype), bias, padding=k // 2, groups=d)
    out = F.silu(out) if silu else out
    return out.flatten(2).transpose(1, 2).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(y.dtype)).to(dtype)


def mix_branches(
    local: Tensor, seen: Tensor, logits: Tensor, bias: Tensor | None, local_weight: Tensor, seen_weight: Tensor,
    local_eps: float, seen_eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    heads = seen.shape[1]
    near = rms_norm(wide(local).unflatten(-1, (heads, -1)), local_weight, local_eps, wide(local).dtype)
    far = rms_norm(wide(seen).transpose(1, 2), seen_weight, seen_eps, near.dtype)
    mix = wide(logits) if bias is None else wide(logits) + wide(bias)
    y = torch.lerp(near, far, mix.sigmoid().unflatten(-1, (heads, -1)).to(near.dtype)).flatten(2)
    return (F.silu(y) if silu else y).to(local.dtype)


def log_gates(narrow: Tensor, weight: Tensor, bias: Tensor | None, temper: float) -> Tensor:
    logits = F.linear(
        wide(narrow), wide(weight).to(wide(narrow).dtype), None if bias is None else wide(bias).to(wide(narrow).dtype)
    )
    return F.logsigmoid(wide(logits)) / temper


def swiglu(joint: Tensor) -> Tensor:
    a, b = joint.chunk(2, -1)
    return F.silu(a) * b


def gated_mlp(x: Tensor, added: Tensor, norm: Tensor, gate_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
    s = x + added
    return s + F.linear(swiglu(F.linear(rms_norm(s, norm, eps, s.dtype), gate_weight)), down_weight)


def gated_block(x: Tensor, w: BlockWeights, s: BlockSettings) -> Tensor:
    d = x.shape[2]
    local = rms_norm(x, w.attn_norm, s.attn_eps, x.dtype)
    local = depthwise_conv(local, (s.height, s.width), w.conv, None, s.conv_silu, x.dtype)
    logs = log_gates(F.linear(local, w.narrow), w.gates, w.gate_bias, s.temper)
    parts = *F.linear(local, w.qkv).split((d // 2, d // 2, d), -1), *logs.chunk(2, -1)
    q, k, v, *gates = (part.unflatten(2, (s.heads, -1)).transpose(1, 2) for part in parts)
    seen, _ = chunked(q, k, v, gates[0], gates[1], s.scale, None)
    logits = F.linear(local, w.mix)
    y = mix_branches(local, seen, logits, w.mix_bias, w.local_norm, w.seen_norm, s.local_eps, s.seen_eps, s.out_silu)
    return gated_mlp(x, F.linear(y, w.out), w.mlp_norm, w.up, w.down, s.mlp_eps)
