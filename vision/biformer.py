"""BiFormer: four stages, the first three with bi-level routing attention. In timm's registry.

Letters: B batch, D width, h, w pixels.

Notable choices: module names are those of the released checkpoints; any image size; the last stage attends densely with 8 heads, as
published; position embedding is a 3x3 depth-wise convolution, so nothing is resampled.

Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention" (Zhu et al., 2023).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from foveal.vision.bilevel import BilevelRoutingAttention, DenseAttention
from foveal.vision.head import check_head

HEAD_DIM = 32


class Block(nn.Module):
    """[B, D, H, W] -> the same: convolution, attention, MLP, each added."""

    def __init__(self, dim: int, topk: int | None, n_win: int, drop_path: float, dd: dict[str, Any]):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn: nn.Module = (
            DenseAttention(dim, **dd)
            if topk is None
            else BilevelRoutingAttention(dim, dim // HEAD_DIM, n_win, topk, **dd)
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        # the second place held an optional convolution; released weights count it
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim, **dd), nn.Identity(), nn.GELU(), nn.Linear(3 * dim, dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(nn.Module):
    """A classifier of images [B, in_chans, h, w]; h and w are at least 32.

    embed_dim, depths   width of the first stage (doubled by each next one), blocks per stage
    topks   regions chosen per stage; None: dense attention
    n_win   regions per axis
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", embed_dim: int = 64, depths: Sequence[int] = (2, 2, 8, 2),
        topks: Sequence[int | None] = (1, 4, 16, None), n_win: int = 7, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
        device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        check_head(num_classes, global_pool)
        if len(depths) != len(topks) or embed_dim % HEAD_DIM:
            raise ValueError(
                f"{len(depths)} depths and {len(topks)} topks at width {embed_dim}; give one of each per stage, and a width that "
                f"is a multiple of {HEAD_DIM}."
            )
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.global_pool, self.output_fmt = num_classes, in_chans, global_pool, "NCHW"
        self.grad_checkpointing = False
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = self.head_hidden_size = dims[-1]
        self.downsample_layers = nn.ModuleList([_stem(in_chans, embed_dim, dd)])
        self.downsample_layers.extend(_halve(a, b, dd) for a, b in itertools.pairwise(dims))
        rates = iter([drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, topk, n_win, next(rates), dd) for _ in range(depth)))
            for dim, topk, depth in zip(dims, topks, depths, strict=True)
        )
        self.feature_info = [{"module": f"stages.{i}", "num_chs": d, "reduction": 4 * 2**i} for i, d in enumerate(dims)]
        self.norm: nn.Module = nn.BatchNorm2d(dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(dims[-1], num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers truncated normal with deviation 0.02 and no bias; convolutions as PyTorch draws them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # ---- what timm asks
    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [(r"^downsample_layers\.([1-9])", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^downsample_layers\.0", "blocks": r"^(?:stages|downsample_layers)\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.global_pool = self.global_pool if global_pool is None else global_pool
        check_head(num_classes, self.global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()

    # ---- forward
    def _stage(self, i: int, x: Tensor) -> Tensor:
        x = self.downsample_layers[i](x)
        for block in self.stages[i].children():
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """-> [B, D, h / 32, w / 32], normalised."""
        for i in range(len(self.stages)):
            x = self._stage(i, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean((2, 3)) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Maps of the stages at ``indices`` (the last n, or a list), and the final output."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is unknown here; maps are 'NCHW'.")
        take, last = feature_take_indices(len(self.stages), indices)
        found, final = [], len(self.stages) - 1
        for i in range(last + 1 if stop_early else final + 1):
            x = self._stage(i, x)
            if i in take:
                found.append(self.norm(x) if norm and i == final else x)
        return found if intermediates_only else (self.norm(x) if x.shape[1] == self.num_features else x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take, last = feature_take_indices(len(self.stages), indices)
        if last < len(self.stages) - 1:
            self.stages, self.downsample_layers = self.stages[: last + 1], self.downsample_layers[: last + 1]
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.norm = nn.Identity()
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _stem(in_chans: int, dim: int, dd: dict[str, Any]) -> nn.Sequential:
    """To a quarter of the size, by two convolutions."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def _halve(dim: int, to: int, dd: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, to, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(to, **dd))


def _cfg(**extra: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "downsample_layers.0.0", "classifier": "head",
        "paper_ids": "arXiv:2303.08810", "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "origin_url": "https://github.com/rayleizhu/BiFormer", **extra,
    }  # fmt: skip


SIZES = ("tiny", "small", "base")
default_cfgs = generate_default_cfgs({f"biformer_{size}.untrained": _cfg() for size in SIZES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    return build_model_with_cfg(BiFormer, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T, 13.1 M parameters."""
    return _create("biformer_tiny", pretrained, **({"embed_dim": 64, "depths": (2, 2, 8, 2)} | kwargs))


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S, 25.5 M parameters."""
    return _create("biformer_small", pretrained, **({"embed_dim": 64, "depths": (4, 4, 18, 4)} | kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B, 56.8 M parameters."""
    return _create("biformer_base", pretrained, **({"embed_dim": 96, "depths": (4, 4, 18, 4)} | kwargs))
