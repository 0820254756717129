"""LINA's attention: linear, in both directions, with a gate on keys and values and a convolution beside it.

Letters: B batch, H heads, N tokens, M prefix tokens (not on a grid), n image tokens in raster order (N = M + n), D width, d = D / H.
Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens".

Notable choices
- The convolution reads the input of the module, not the values, and is added to image tokens before the output projection, on a GPU
  while attention's own output is still in registers.
- Sums over tokens are fp32 under autocast too; what is multiplied with weights follows autocast.
- The key gate enters the denominator, the value gate does not: key gates times a constant change nothing, value gates scale.
- Arguments and attributes are those that timm's blocks expect: ``attn_layer=LinearAttention``. Softmax weights do not
  transfer: it must be trained with this attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.kernels.gated_linear.plain import NORMALISATIONS, projected_linear_attention, with_last
from foveal.kernels.token_mixing import depthwise_conv

KERNEL = 5
FADE = 16.0  # of a gate from the input: sigmoid(x) ** (1 / FADE)


class LinearAttention(nn.Module):
    """Attention with ReLU features whose cost is linear in the number of tokens.

    dim, num_heads    dim must be divisible by num_heads
    normalisation     "division" or "subtraction"
    gate              None; "raw" or "exp": learned scalars of a head and a position, ``tokens`` of them (initially 1); or "data":
                      one linear layer of the input, for any N
    per_head          False: one gate for all heads
    prefix, conv      M, and whether the other tokens, a full square grid, pass the convolution
    implementation    of ``linear_attention``; None chooses
    qk_norm, scale_norm, attn_drop   timm's, refused: there are no softmax weights to normalise or to drop

    Raises ValueError in one sentence for sizes and settings that do not fit.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, qk_norm: bool = False, scale_norm: bool = False, proj_bias: bool = True,
        attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, *, normalisation: str = "division", eps: float = 1e-6,
        gate: str | None = None, tokens: int = 0, per_head: bool = True, prefix: int = 0, conv: bool = False,
        implementation: str | None = None, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        _check(dim, num_heads, normalisation, qk_norm or scale_norm, attn_drop, gate, tokens)
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.attn_dim = num_heads, dim // num_heads, dim
        self.normalisation, self.eps, self.gate, self.prefix = normalisation, eps, gate, prefix
        self.implementation = implementation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dw_conv = nn.Conv2d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim, **dd) if conv else None
        rows = num_heads if per_head else 1
        if gate == "data":
            self.gates = nn.Linear(dim, 2 * rows, **dd)
        elif gate is not None:
            self.key_scale = nn.Parameter(torch.full((1, rows, tokens, 1), float(gate == "raw"), **dd))
            self.value_scale = nn.Parameter(torch.ones(1, rows, tokens, 1, **dd))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, key_mask: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D].

        key_mask    [B, N] bool, False for tokens that nobody sees: as if they were not there (in division up to eps)
        attn_mask   the same as timm's blocks give it, [B, 1, 1, N] or [B, N] bool; any other mask, and ``is_causal``, is
                    NotImplementedError
        """
        if is_causal:
            raise NotImplementedError(
                "this attention is bidirectional; leave is_causal out, or use ViG's mixer for scans."
            )
        if attn_mask is not None:
            key_mask = _keys_of(attn_mask, x)
        qkv = self.qkv(x)
        key_gate, value_gate = self._gates(x)
        local = None if self.dw_conv is None else self._local(x)
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                out = self._attend(qkv, key_gate, value_gate, key_mask, local)
        else:
            out = self._attend(qkv, key_gate, value_gate, key_mask, local)
        out = self.proj(out)
        return self.proj_drop(out) if self.training else out

    def _attend(
        self, qkv: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, key_mask: Tensor | None, local: Tensor | None
    ) -> Tensor:  # fmt: skip
        """qkv [B, N, 3 D], local [B, n, D] -> [B, N, D]"""
        if key_mask is not None:
            seen = key_mask[:, None, :, None].float()
            if self.normalisation == "subtraction":
                return _subtraction(qkv, self.num_heads, key_gate, value_gate, seen, local)
            key_gate = seen if key_gate is None else key_gate * seen
        return projected_linear_attention(
            qkv, self.num_heads, normalisation=self.normalisation, key_gate=key_gate, value_gate=value_gate, added=local, eps=self.eps,
            implementation=self.implementation,
        )  # fmt: skip

    def _gates(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """-> gates of keys and of values, [B or 1, H or 1, N, 1]"""
        if self.gate is None:
            return None, None
        if self.gate == "data":
            both = (F.logsigmoid(self.gates(x).float()) / FADE).exp().transpose(1, 2)[..., None]
            key, value = both.chunk(2, 1)
            return key, value
        scale = self.key_scale
        if x.shape[1] != scale.shape[2]:
            raise ValueError(
                f"the gates are made for {scale.shape[2]} tokens and the input has {x.shape[1]}; for another grid call "
                "resize_gates_(grid) on the model, and fine-tune it."
            )
        return scale.exp() if self.gate == "exp" else scale, self.value_scale

    def _local(self, x: Tensor) -> Tensor:
        """The convolution of the image tokens, [B, n, D]"""
        conv, n = self.dw_conv, x.shape[1] - self.prefix
        assert conv is not None
        side = math.isqrt(max(n, 0))
        if side * side != n or not side:
            raise ValueError(
                f"{x.shape[1]} tokens without {self.prefix} of the prefix are {n}, which form no square grid; the "
                "convolution needs all tokens of an image."
            )
        return depthwise_conv(x.narrow(1, self.prefix, n), (side, side), conv.weight, conv.bias)

    @torch.no_grad()
    def resize_gates_(self, grid: int) -> None:
        """Gates for a grid x grid image and (grid / 2) x (grid / 2) queries, bilinearly where they are learned."""
        self.prefix = (grid // 2) ** 2 if self.prefix else 0
        if self.gate in ("raw", "exp"):
            for name in ("key_scale", "value_scale"):
                setattr(self, name, nn.Parameter(resized_gates(getattr(self, name), grid)))


def resized_gates(gates: Tensor, grid: int) -> Tensor:
    """[1, H, N, 1] with N = 5 M, M queries and 4 M image tokens -> the same for grid x grid image tokens.

    Raises ValueError when N is no such number or the grid is odd.
    """
    m = gates.shape[2] // 5
    side = math.isqrt(m)
    if 5 * side * side != gates.shape[2] or grid % 2 or grid < 2:
        raise ValueError(
            f"{gates.shape[2]} gates go to a grid of {grid}; five times a square number of gates and an even grid are needed."
        )
    parts = []
    for part, old, new in ((gates[:, :, :m], side, grid // 2), (gates[:, :, m:], 2 * side, grid)):
        image = part.unflatten(2, (old, old)).squeeze(-1)
        parts.append(F.interpolate(image.float(), size=(new, new), mode="bilinear", align_corners=False).flatten(2))
    return torch.cat(parts, 2)[..., None].to(gates.dtype)


def _subtraction(
    qkv: Tensor, heads: int, key_gate: Tensor | None, value_gate: Tensor | None, seen: Tensor, local: Tensor | None
) -> Tensor:
    """Subtraction over the tokens that are seen, [B, 1, N, 1] of 0 and 1: means are theirs."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scale, dtype = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
    share = seen.to(dtype) / seen.sum(2, keepdim=True).clamp_min(1)
    wide = [x.to(dtype) for x in (q.relu(), k.relu(), v)]
    keys = wide[1] if key_gate is None else wide[1] * key_gate
    values = wide[2] if value_gate is None else wide[2] * value_gate
    mean_key, mean_value = (keys * share).sum(2, keepdim=True), (values * share).sum(2, keepdim=True)
    pairs = (keys * share).mT @ values
    out = (scale * (wide[0] @ pairs) + (1 - scale * (wide[0] @ mean_key.mT)) * mean_value).to(v.dtype)
    return (
        with_last(out, None if local is None else local.unflatten(-1, (heads, -1)).transpose(1, 2))
        .transpose(1, 2)
        .flatten(2)
    )


def _keys_of(mask: Tensor, x: Tensor) -> Tensor:
    """A mask that is the same for all queries as [B, N]; NotImplementedError for others."""
    b, n = x.shape[:2]
    rows = mask.reshape(mask.shape[0], -1) if mask.dtype == torch.bool and mask.numel() == mask.shape[0] * n else None
    if rows is None or mask.shape[-1] != n or mask.shape[0] not in (1, b):
        raise NotImplementedError(
            f"attn_mask is {mask.dtype} {tuple(mask.shape)}; linear attention has no matrix of pairs to mask: give a bool mask over "
            f"keys, ({b}, {n}) or ({b}, 1, 1, {n})."
        )
    return rows.expand(b, n)


def _check(dim: int, heads: int, normalisation: str, normed: bool, drop: float, gate: str | None, tokens: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"dim {dim} is not divisible by {heads} heads; choose another number of heads.")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"there is no normalisation {normalisation!r}; choose one of {', '.join(NORMALISATIONS)}.")
    if normed or drop:
        raise ValueError("linear attention has no softmax weights: leave qk_norm, scale_norm and attn_drop out.")
    if gate not in (None, "raw", "exp", "data") or (gate in ("raw", "exp") and tokens < 1):
        raise ValueError(
            f"gate is {gate!r} with {tokens} tokens; choose None, 'data', or 'raw' or 'exp' with the number of tokens."
        )
