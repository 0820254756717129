"""ContMix: a depth-wise convolution whose kernel at every place comes from how that place relates to the whole map.

Letters: B batch, C width, g heads (twice ``num_heads``), c channels of a head, H rows, W columns, N = H W, K kernel size, S small kernel
size, P prefix tokens, R context cells (7 x 7).

* The kernels are applied by ``neighborhood_mix``: windows are pushed inwards at borders, and so are the offsets of the position tables.
* The released layer reads values from the input itself, without a projection; so does this one. The published model takes keys from an
  overview of the image; give it as ``context``, else the map is its own.
* A map with a side shorter than K is enlarged (bilinear, same aspect) until it fits, and the result pooled back, as published.
* Prefix tokens, in ViTs, are ours: they attend to the context cells and to each other with the same queries and keys; the map does not
  read them.

Source: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels" (Lou and Yu, 2025). The convolution,
squeeze-and-excitation and gate that stand around the mixer in OverLoCK's block are not here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models.vision_transformer import ATTN_LAYERS
from torch import Tensor, nn

from foveal.vision.neighborhood_mixing import neighborhood_mix, window_starts
from foveal.vision.token_layer import GridLayer, Plane, check_heads

CELLS = 7  # context cells per side


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """table [g, 2K - 1, 2K - 1], by offset from the place -> [g, H, W, K * K], by place of the window."""
    size = (table.shape[-1] + 1) // 2
    inside = torch.arange(size, device=table.device)
    at = [
        (window_starts(n, size, table.device) - torch.arange(n, device=table.device))[:, None] + inside + size - 1
        for n in (height, width)
    ]
    return table[:, at[0][:, None, :, None], at[1][None, :, None, :]].flatten(3)


@register_notrace_module
class ContextMixing(nn.Module):
    """Maps [B, C, H, W] -> [B, C, H, W], C divisible by 4 * num_heads: half the channels through S x S kernels, half through K x K.

    kernel_size   K, odd; OverLoCK takes 17, 15, 13, 7 by stage. smk_size: S, odd, at most K
    context_dim   width of the map that keys come from; default C, the map itself
    """

    def __init__(
        self, dim: int, num_heads: int = 2, kernel_size: int = 7, smk_size: int = 5, context_dim: int | None = None,
        device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        check_heads(dim, num_heads, 4)
        for name, size in (("kernel_size", kernel_size), ("smk_size", smk_size)):
            if size < 1 or size % 2 == 0 or size > kernel_size:
                raise ValueError(f"{name} is {size}; it is odd, at least 1 and at most kernel_size, {kernel_size}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.kernel_size, self.smk_size = 2 * num_heads, kernel_size, smk_size
        self.scale = (dim // self.heads) ** -0.5
        self.context_dim = dim if context_dim is None else context_dim
        self.weight_query = _conv_norm(dim, dim // 2, dd)
        self.weight_key = _conv_norm(self.context_dim, dim // 2, dd)
        self.weight_proj = nn.Linear(CELLS * CELLS, kernel_size**2 + smk_size**2, **dd)
        self.rpb1 = nn.Parameter(torch.zeros(self.heads, 2 * smk_size - 1, 2 * smk_size - 1, **dd))
        self.rpb2 = nn.Parameter(torch.zeros(self.heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.dyconv_proj = _conv_norm(dim, dim, dd)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "ContextMixing cannot be turned into TorchScript, because it runs through an operator that TorchScript cannot hold; use "
            "torch.compile instead."
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], context [B, context_dim, any, any]: default x"""
        return self.dyconv_proj(self.read(x, x if context is None else context, x[:, :, :0, 0])[0])

    def read(self, x: Tensor, context: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
        """Before the last projection: the map's [B, C, H, W] and the prefix tokens' [B, C, P] of ahead [B, C, P]."""
        if context.shape[1] != self.context_dim:
            raise ValueError(
                f"the context has {context.shape[1]} channels; this layer takes keys from {self.context_dim}, its context_dim."
            )
        size = (x.shape[2], x.shape[3])
        grid = self.enlarged(*size)
        if grid != size:
            context, x = (F.interpolate(t, grid, mode="bilinear") for t in (context, x))
        places, lead = x.shape[2] * x.shape[3], ahead.shape[2]
        query = self.weight_query(torch.cat((x.flatten(2), ahead), 2)[..., None])
        cells = F.adaptive_avg_pool2d(context, CELLS).flatten(2)
        key = self.weight_key(torch.cat((cells, ahead), 2)[..., None] if lead else cells[..., None])
        query, key = (self._split(t[..., 0]) for t in (query * self.scale, key))  # [B, g, c, ..]
        small, large = self._kernels(query[..., :places].mT @ key[..., : CELLS * CELLS], *grid)
        halves = x.unflatten(1, (2, self.heads, -1)).permute(1, 0, 2, 4, 5, 3)  # [2, B, g, H, W, c]
        near = neighborhood_mix(small.to(x.dtype), halves[0])
        far = neighborhood_mix(large.to(x.dtype), halves[1])
        out = torch.cat((near, far), 1).permute(0, 1, 4, 2, 3).flatten(1, 2)
        out = F.adaptive_avg_pool2d(out, size) if grid != size else out
        if not lead:
            return out, ahead
        values = torch.cat((F.adaptive_avg_pool2d(x, CELLS).flatten(2), ahead), 2)  # [B, C, R + P]
        seen = (query[..., places:].mT @ key).softmax(-1).to(values.dtype)
        return out, (values.unflatten(1, (2, self.heads, -1)) @ seen[:, None].mT).flatten(1, 3)

    def enlarged(self, height: int, width: int) -> Plane:
        """The size that a map is mixed at."""
        side = min(height, width)
        if side >= self.kernel_size:
            return height, width
        return self.kernel_size * height // side, self.kernel_size * width // side

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))

    def _kernels(self, affinity: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """affinity [B, g, N, R] -> kernels [B, g, H, W, S * S] and [B, g, H, W, K * K], each summing to 1"""
        logits = self.weight_proj(affinity).unflatten(2, (height, width))
        small, large = logits.split([self.smk_size**2, self.kernel_size**2], -1)
        small = small + relative_bias(self.rpb1, height, width)
        return small.softmax(-1), (large + relative_bias(self.rpb2, height, width)).softmax(-1)


def _conv_norm(dim: int, to: int, dd: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, to, 1, bias=False, **dd), nn.BatchNorm2d(to, **dd))


class ContextMixingTokens(GridLayer):
    """``ContextMixing`` in a ViT, ``attn_layer="foveal.contmix"``: tokens [B, P + H W, D] -> the same.

    It ends in a linear ``proj``, as OverLoCK's block ends in a 1x1 convolution. kernel_size, smk_size as ``ContextMixing``; D is divisible by
    4 * num_heads. ``qkv_bias`` changes nothing, because batch norms carry the shifts. Raises ``ValueError`` for qk_norm and attn_drop.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_norm: bool = False, scale_norm: bool = False,
        proj_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, num_prefix_tokens: int = 0,
        device: Any = None, dtype: Any = None, kernel_size: int = 7, smk_size: int = 5,
    ):  # fmt: skip
        super().__init__(num_prefix_tokens)
        if qk_norm or attn_drop:
            what = "qk_norm" if qk_norm else f"attn_drop={attn_drop}"
            raise ValueError(f"context mixing has no place for {what}; build the model without it.")
        if scale_norm and norm_layer is None:
            raise ValueError(
                "scale_norm needs norm_layer, the class of the norm; give one, such as torch.nn.LayerNorm."
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixer = ContextMixing(dim, num_heads, kernel_size, smk_size, **dd)
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid: Plane | None = None
    ) -> Tensor:
        self.refuse_masks(attn_mask, is_causal)
        prefix, plane = self.locate(x.shape[1], grid)
        channels = x.mT
        picture = channels[..., prefix:].unflatten(2, plane)
        seen, ahead = self.mixer.read(picture, picture, channels[..., :prefix])
        out = self.mixer.dyconv_proj(torch.cat((ahead, seen.flatten(2)), 2)[..., None])[..., 0].mT
        return self.proj_drop(self.proj(self.norm(out)))


ATTN_LAYERS["foveal.contmix"] = ContextMixingTokens
