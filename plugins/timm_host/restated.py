"""Token attention of timm, restated around its core: what comes before ``softmax(Q K^T) V``, and what comes after.

Letters: B batch, H heads, Hkv key heads, N tokens, D head dim, C width.

* The same operations in the same order as timm's ``Attention``, ``AttentionRope`` and ``EvaAttention``, so that the dense way
  through here is theirs to the bit. A module is only taken over after a probe has shown that this holds for it.
* Rotary positions turn grid tokens only; prefix tokens keep what they are.
* Grouped key heads stay grouped: kernels read them as they are.
* Under autocast q, k, v get the type that PyTorch's own attention would cast them to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor


class Core(NamedTuple):
    """Arguments of one attention call: q [B, H, N, D], k, v [B, Hkv, N, D], after norm and rotary positions."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    dropout: float = 0.0


def project(attn: Any, x: Tensor, rope: Tensor | None, mask: Tensor | None, causal: bool) -> Core:
    """x [B, N, C] -> the call that the module is about to make."""
    q, k, v = _qkv(attn, x)
    q, k = _norm(attn, "q_norm", q), _norm(attn, "k_norm", k)
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (_rotate(t, rope, prefix, half).type_as(v) for t in (q, k))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    dropout = attn.attn_drop.p if attn.training and hasattr(attn, "attn_drop") else 0.0
    return Core(q, k, v, mask, attn.scale, causal, dropout)


def finish(attn: Any, x: Tensor, out: Tensor) -> Tensor:
    """x [B, N, C], the module's input, and out [B, H, N, D] -> the module's output [B, N, C]"""
    y = _norm(attn, "norm", out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y)) if hasattr(attn, "proj_drop") else attn.proj(y)


def dense(core: Core) -> Tensor:
    """PyTorch's attention, as the module's fused path calls it. -> [B, H, N, D]"""
    k, v = core.k, core.v
    groups = core.q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        core.q, k, v, attn_mask=core.mask, dropout_p=core.dropout, is_causal=core.causal
    )


def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = x.shape
    heads = attn.num_heads
    if getattr(attn, "qkv", None) is not None:
        y = _fused_projection(attn, x).reshape(batch, tokens, 3, heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    key_heads = getattr(attn, "num_kv_heads", heads)
    parts = ((attn.q_proj, heads), (attn.k_proj, key_heads), (attn.v_proj, key_heads))
    q, k, v = (proj(x).reshape(batch, tokens, n, -1).transpose(1, 2) for proj, n in parts)
    return q, k, v


def _fused_projection(attn: Any, x: Tensor) -> Tensor:
    """EVA keeps biases of q and v beside a product without bias, and adds them in or after it."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if getattr(attn, "qkv_bias_separate", False) or not hasattr(attn.qkv, "weight"):
        return attn.qkv(x) + bias
    return F.linear(x, weight=attn.qkv.weight, bias=bias)


def _norm(attn: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(attn, name, None)
    return x if norm is None else norm(x)


def _rotate(t: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    return torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)], dim=2)
