"""Decay attention: softmax attention whose scores fall with the distance on the grid, whole or in two one-dimensional passes.

Letters: B batch, h heads, N tokens, P prefix tokens, H rows, W columns, d head dim, D width, n length of an axis, s of a segment.

* Every head has a rate: a score loses ``-log gamma`` per step. Whole: steps down plus steps across. In two passes: first along rows,
  then along columns over what the first one gave, with the same queries and keys, so cost is N (H + W) instead of N^2.
* Decomposed passes inside (shifted) windows are passes inside segments of one axis. A segment at a border is just shorter: nothing is padded,
  rolled or masked. That equals rolling and masking as Swin does it.
* Positions: RoPE by the raster index, as published.
* Prefix tokens are ours: they see everything without decay, and every pass sees them without decay. They carry no position.
* The whole form adds a bias of h N^2 numbers; without gradients it is made in pieces of ``BIAS_ELEMENTS``.
* The linear form (no softmax; experimental) is a gated linear scan of each line in both directions; its output wants a norm.

Sources: "RMT: Retentive Networks Meet Vision Transformers" (Fan et al., 2024); the windowed form with a gate: "Gated-SwinRMT", of which the
*Retention* variant is here. Its SWAT variant is not published in enough detail to be built, and is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from timm.models.vision_transformer import ATTN_LAYERS
from torch import Tensor, nn

from foveal.kernels.gated_linear import bidirectional_gated_linear_attention
from foveal.vision.token_layer import Plane, TokenAttention, with_prefix

BIAS_ELEMENTS = 1 << 24
FORMS = ("decomposed", "full", "linear")
SWAT = "SWAT's scores, slopes and gate are not published in enough detail to be built; use variant='retention', the softmax form with decay."


class Rule(NamedTuple):
    """What every pass of one call shares; see ``decay_attention``."""

    rates: Tensor
    form: str
    window: int | None
    shift: int
    scale: float
    dropout: float

    def attend(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, prefix: int) -> Tensor:
        """distance [queries, keys without the prefix]: softmax attention with decay, none towards the prefix."""
        rates = self.rates.to(torch.promote_types(q.dtype, torch.float32))[:, None, None]
        bias = F.pad(distance * rates, (prefix, 0)).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], dropout_p=self.dropout, scale=self.scale)


def decay_rates(num_heads: int, heads_range: float = 4.0, initial_value: float = 2.0, device: Any = None) -> Tensor:
    """log gamma of every head, fp32 [h]: gamma_i = 1 - 2 ** (-initial_value - heads_range * i / h). Larger: heads look further."""
    steps = torch.arange(num_heads, dtype=torch.float64, device=device) / num_heads
    return torch.log1p(-(2.0 ** (-initial_value - heads_range * steps))).float()


def rotate(x: Tensor) -> Tensor:
    """RoPE by place: x [B, h, N, d], d even -> the same; pairs (2i, 2i+1) of token t turn by t * 10000 ** -(i / (d/2 - 1))."""
    n, half = x.shape[-2], x.shape[-1] // 2
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = 10000.0 ** -torch.linspace(0, 1, half, dtype=wide, device=x.device)
    turn = torch.arange(n, dtype=wide, device=x.device)[:, None] * angle
    even, odd = x[..., 0::2].to(wide), x[..., 1::2].to(wide)
    cos, sin = turn.cos(), turn.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, grid: Plane, *, form: str = "decomposed", window: int | None = None, shift: int = 0,
    prefix: int = 0, scale: float | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention over tokens in raster order, prefix tokens first.

    q, k, v   [B, h, P + H W, d] of one float type, any strides; positions are in them already
    rates     log gamma [h]; 0 is no decay
    form      "decomposed", "full", or "linear" (experimental: no softmax and no normaliser)
    window    passes stay inside segments of so many rows and columns; shift: the first segment is that much shorter
    scale     of the scores, default d ** -0.5; dropout: of attention weights

    -> [B, h, P + H W, d]. Differentiable in q, k and v. Raises ``ValueError`` for tokens that do not form the grid and for unknown
    forms, windows and shifts.
    """
    _check(q, rates, grid, form, window, shift, prefix, dropout)
    rule = Rule(rates, form, window, shift, q.shape[-1] ** -0.5 if scale is None else scale, dropout)
    if form == "full":
        body = _full(q[:, :, prefix:], k, v, grid, prefix, rule)
    else:
        lead = (k[:, :, :prefix], v[:, :, :prefix])
        q_map, k_map, v_map = (x[:, :, prefix:].unflatten(2, grid) for x in (q, k, v))
        rows = lambda x: x.transpose(1, 2)  # noqa: E731  [B, H, h, W, d]
        columns = lambda x: x.permute(0, 3, 1, 2, 4)  # noqa: E731  [B, W, h, H, d]
        seen = _lines(rows(q_map), rows(k_map), rows(v_map), lead, rule).transpose(1, 2)
        body = _lines(columns(q_map), columns(k_map), columns(seen), lead, rule)
        body = body.permute(0, 2, 3, 1, 4).flatten(2, 3)
    if not prefix:
        return body
    return torch.cat(
        (F.scaled_dot_product_attention(q[:, :, :prefix], k, v, dropout_p=dropout, scale=rule.scale), body), 2
    )


def _check(
    q: Tensor, rates: Tensor, grid: Plane, form: str, window: int | None, shift: int, prefix: int, dropout: float
) -> None:
    check_form(form, window, shift)
    if grid[0] * grid[1] + prefix != q.shape[2]:
        raise ValueError(
            f"{q.shape[2]} tokens do not form a grid of {grid[0]} by {grid[1]} plus {prefix} prefix tokens; pass the grid they come from."
        )
    if rates.shape != q.shape[1:2]:
        raise ValueError(
            f"rates have shape {tuple(rates.shape)}; one number for each of the {q.shape[1]} heads is needed."
        )
    if form == "linear" and (prefix or dropout):
        raise ValueError("form='linear' takes neither prefix tokens nor dropout; use form='decomposed'.")


def check_form(form: str, window: int | None, shift: int) -> None:
    if form not in FORMS:
        raise ValueError(f"there is no form {form!r}; choose one of {', '.join(FORMS)}.")
    if window is not None and form == "full":
        raise ValueError(
            "windows cut the one-dimensional passes, which form='full' has not; use form='decomposed', or no window."
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a segment has at least 1 token.")
    if not 0 <= shift < (1 if window is None else window):
        raise ValueError(f"shift is {shift}; with window {window} it is 0 or more and less than the window.")


def segments(length: int, window: int | None, shift: int) -> list[tuple[int, int, int]]:
    """An axis as runs of equal segments: [(first token, tokens of a segment, how many)], at most three of them."""
    if window is None:
        return [(0, length, 1)]
    first = min(window - shift, length) if shift else 0
    whole, rest = divmod(length - first, window)
    runs = [(0, first, 1), (first, window, whole), (length - rest, rest, 1)]
    return [run for run in runs if run[1] and run[2]]


def _lines(q: Tensor, k: Tensor, v: Tensor, lead: tuple[Tensor, Tensor], rule: Rule) -> Tensor:
    """Attention along each line. q, k, v [B, lines, h, n, d], lead k and v [B, h, P, d] -> like q"""
    parts = []
    for start, size, count in segments(q.shape[3], rule.window, rule.shift):
        pq, pk, pv = (_cut(x, start, size, count) for x in (q, k, v))
        if rule.form == "linear":
            out = _linear(pq, pk, pv, rule)
        else:
            prefix, repeats = lead[0].shape[2], q.shape[1] * count
            if prefix:
                ahead = [x[:, None].expand(-1, repeats, -1, -1, -1).flatten(0, 1) for x in lead]
                pk, pv = torch.cat((ahead[0], pk), 2), torch.cat((ahead[1], pv), 2)
            steps = torch.arange(size, device=q.device)
            out = rule.attend(pq, pk, pv, (steps[:, None] - steps).abs(), prefix)
        parts.append(out.unflatten(0, (q.shape[0], q.shape[1], count)).transpose(2, 3).flatten(3, 4))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


def _cut(x: Tensor, start: int, size: int, count: int) -> Tensor:
    """[B, lines, h, n, d] -> [B * lines * count, h, size, d]"""
    return x.narrow(3, start, size * count).unflatten(3, (count, size)).transpose(2, 3).flatten(0, 2)


def _linear(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """out_i = scale * sum_j gamma ** |i - j| (q_i . k_j) v_j along dimension 2 of [b, h, n, d]."""
    gate = rule.rates[None, :, None].expand(q.shape[:3])
    both = bidirectional_gated_linear_attention(q, k, v, gate, gate, scale=rule.scale)
    return both - (q * k).sum(-1, keepdim=True) * rule.scale * v  # a token's own share came with each direction


def _full(q: Tensor, k: Tensor, v: Tensor, grid: Plane, prefix: int, rule: Rule) -> Tensor:
    """q [B, h, H W, d], k and v [B, h, P + H W, d] -> like q"""
    height, width = grid
    down, across = (torch.arange(n, device=q.device) for n in grid)
    beside = (across[:, None] - across).abs()[:, None]  # [W, 1, W]
    step = max(1, BIAS_ELEMENTS // (q.shape[1] * width * height * width))
    outs = []
    for first in range(0, height, step):
        rows = down[first : first + step]
        distance = (rows[:, None] - down).abs()[:, None, :, None] + beside  # [rows, W, H, W]
        part = q[:, :, first * width : (first + len(rows)) * width]
        outs.append(rule.attend(part, k, v, distance.flatten(2).flatten(0, 1), prefix))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


register_notrace_function(decay_attention)


class DecayAttention(TokenAttention):
    """RMT's attention for tokens [B, N, D] -> [B, N, D]: decay attention plus a 5x5 depth-wise convolution of the values.

    num_heads .. norm_layer   as timm's ``Attention``; d is even
    form            "decomposed" (RMT's first stages), "full" (its last), "linear" (experimental; each head is normalised after)
    heads_range     rates spread over 2 ** -heads_range; RMT takes 4 or 6 by stage
    initial_value   of the fastest head: larger looks further
    window, shift   passes inside segments, see ``decay_attention``
    gate            multiply by the sigmoid of a projection of the input, after the convolution and before ``proj``
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, qk_norm: bool = False, scale_norm: bool = False,
        proj_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, num_prefix_tokens: int = 0,
        device: Any = None, dtype: Any = None, form: str = "decomposed", heads_range: float = 4.0, initial_value: float = 2.0,
        window: int | None = None, shift: int = 0, gate: bool = False,
    ):  # fmt: skip
        super().__init__(
            dim, num_heads, qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer, num_prefix_tokens, device, dtype
        )  # fmt: skip
        check_form(form, window, shift)
        if self.head_dim % 2:
            raise ValueError(
                f"the head dimension is {self.head_dim}; rotary positions turn pairs, so change num_heads until it is even."
            )
        self.form, self.window, self.shift = form, window, shift
        self.heads_range, self.initial_value = heads_range, initial_value
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype)
        self.gate = nn.Linear(dim, dim, device=device, dtype=dtype) if gate else None

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid: Plane | None = None
    ) -> Tensor:
        self.refuse_masks(attn_mask, is_causal)
        prefix, plane = self.locate(x.shape[1], grid)
        q, k, v = self.project(x)
        q, k = (torch.cat((t[:, :, :prefix], rotate(t[:, :, prefix:])), 2) if prefix else rotate(t) for t in (q, k))
        rates = decay_rates(self.num_heads, self.heads_range, self.initial_value, x.device)
        out = decay_attention(
            q, k, v, rates, plane, form=self.form, window=self.window, shift=self.shift, prefix=prefix, scale=self.scale,
            dropout=self.dropout,
        )  # fmt: skip
        out = F.rms_norm(out, out.shape[-1:]) if self.form == "linear" else out
        near = v[:, :, prefix:].transpose(2, 3).flatten(1, 2).unflatten(2, plane)  # [B, D, H, W]
        near = with_prefix(self.lepe(near).flatten(2).transpose(1, 2), prefix)
        return self.finish(out.transpose(1, 2).flatten(2) + near, None if self.gate is None else self.gate(x).sigmoid())


class SwinDecayAttention(DecayAttention):
    """The *Retention* variant of Gated-SwinRMT: decomposed passes inside shifted windows, and a sigmoid gate.

    window    the paper's is not known; 7 is Swin's. ``alternate_shifts(model)`` shifts every other layer by half of it
    variant   "retention"; "swat" is refused
    Other arguments as ``DecayAttention``.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, qk_norm: bool = False, scale_norm: bool = False,
        proj_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, num_prefix_tokens: int = 0,
        device: Any = None, dtype: Any = None, heads_range: float = 4.0, initial_value: float = 2.0, window: int = 7, shift: int = 0,
        variant: str = "retention",
    ):  # fmt: skip
        if variant != "retention":
            unknown = f"there is no variant {variant!r}; choose 'retention'."
            raise ValueError(SWAT if variant == "swat" else unknown)
        super().__init__(
            dim, num_heads, qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer, num_prefix_tokens, device, dtype,
            "decomposed", heads_range, initial_value, window, shift, gate=True,
        )  # fmt: skip


def alternate_shifts(model: nn.Module) -> nn.Module:
    """Shift the windows of every other ``SwinDecayAttention`` of a model by half a window. Returns the model."""
    for index, layer in enumerate(m for m in model.modules() if isinstance(m, SwinDecayAttention)):
        layer.shift = layer.window // 2 if index % 2 and layer.window else 0
    return model


ATTN_LAYERS["foveal.decay"] = DecayAttention
ATTN_LAYERS["foveal.swin_decay"] = SwinDecayAttention
