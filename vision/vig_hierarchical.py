"""ViG, hierarchical: four stages of maps, for recognition and dense prediction. In timm's registry.

Letters: B batch, N tokens, D width. Source: as in vig.py. Module names are those of the released checkpoints; only the head's place
differs (``norm``, ``head.fc``). Inside a stage everything is tokens: a map is flattened once and unfolded once.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from foveal.kernels.token_mixing import swiglu
from foveal.vision.head import check_head
from foveal.vision.vig_checkpoint import checkpoint_filter_fn
from foveal.vision.vig_mixer import BidirectionalMixer


@register_notrace_module
class GatedMlp(nn.Module):
    """SwiGLU: [a, b] = fc1(x), fc2(silu(a) b)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        hidden = 32 * -(-(8 * dim // 3) // 32)
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop_path: float, eval_half: bool, dd: dict):
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.op = BidirectionalMixer(dim, num_heads, eval_half=eval_half, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = GatedMlp(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution, then (but after the last) a step to half of it. Places 0 and 2 of ``downsample`` hold no weights."""

    def __init__(self, dim: int, to: int | None, num_heads: int, drop_path: list[float], eval_half: bool, dd: dict):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate, eval_half, dd) for rate in drop_path)
        self.downsample: nn.Module = nn.Identity()
        if to is not None:
            conv = nn.Conv2d(dim, to, 3, stride=2, padding=1, **dd)
            self.downsample = nn.Sequential(nn.Identity(), conv, nn.Identity(), LayerNorm2d(to, eps=1e-5, **dd))

    def same_size(self, x: Tensor) -> Tensor:
        """The blocks alone: [B, D, h, w] -> [B, D, h, w]."""
        height, width = x.shape[-2], x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        return x.transpose(1, 2).unflatten(2, (height, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.same_size(x))


def stem(in_chans: int, dim: int, dd: dict) -> nn.Sequential:
    """Image -> [B, D, h / 4, w / 4]. Identities keep the released numbering."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd), nn.Identity(), LayerNorm2d(dim // 2, eps=1e-5, **dd),
        nn.Identity(), nn.GELU(), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd), nn.Identity(), LayerNorm2d(dim, eps=1e-5, **dd),
    )  # fmt: skip


class HierarchicalViG(nn.Module):
    """timm's contract for models of stages. Widths double from stage to stage; heads are 32 wide (keys 16)."""

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 5, 2), num_heads: tuple[int, ...] = (3, 6, 12, 24), eval_half: bool = False,
        drop_rate: float = 0.0, drop_path_rate: float = 0.0, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        check_head(num_classes, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.output_fmt = num_classes, in_chans, "NCHW"
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_embed = stem(in_chans, embed_dim, dd)
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        self.layers = nn.ModuleList(
            Stage(dim, to, heads, [next(rates) for _ in range(depth)], eval_half, dd)
            for dim, to, heads, depth in zip(dims, [*dims[1:], None], num_heads, depths, strict=True)
        )
        self.feature_info = [{"module": f"layers.{i}", "num_chs": d, "reduction": 4 * 2**i} for i, d in enumerate(dims)]
        self.norm: nn.Module = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers truncated normal with deviation 0.02, also inside the mixers, whose convolution keeps its own draw."""
        for module in self.modules():
            if isinstance(module, BidirectionalMixer):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = (
            r"^layers\.(\d+)"
            if coarse
            else [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))]
        )
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_head(num_classes, "avg" if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """-> [B, D, h / 32, w / 32], normalised."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Maps of the stages at ``indices`` (the last n, or a list), before their step to half the size; and the final output."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is unknown here; maps are 'NCHW'.")
        take, last = feature_take_indices(len(self.layers), indices)
        x, found = self.patch_embed(x), []
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage.same_size(x)  # type: ignore[operator]
            if i in take:
                found.append(self.norm(x) if norm and i == len(self.layers) - 1 else x)
            if not (stop_early and i == last):
                x = stage.downsample(x)  # type: ignore[operator]
        if intermediates_only:
            return found
        return (self.norm(x) if x.shape[1] == self.num_features else x), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take, last = feature_take_indices(len(self.layers), indices)
        if last < len(self.layers) - 1:
            self.layers = self.layers[: last + 1]
            self.layers[last].downsample = nn.Identity()
            self.num_features = self.head_hidden_size = self.head.in_features = self.feature_info[last]["num_chs"]
            self.norm = nn.Identity()
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _cfg(**extra: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.0", "classifier": "head.fc",
        "paper_ids": "arXiv:2405.18425", "paper_name": "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        "origin_url": "https://github.com/hustvl/ViG", **extra,
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {"vig_h_tiny.untrained": _cfg(), "vig_h_small.untrained": _cfg(), "vig_h_base.untrained": _cfg()}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> HierarchicalViG:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        HierarchicalViG, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"}, **kwargs,
    )  # fmt: skip


@register_model
def vig_h_tiny(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-T, 28.6 M parameters."""
    return _create(
        "vig_h_tiny", pretrained, **({"embed_dim": 96, "depths": (2, 2, 5, 2), "num_heads": (3, 6, 12, 24)} | kwargs)
    )


@register_model
def vig_h_small(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-S, 50.1 M parameters."""
    return _create(
        "vig_h_small", pretrained, **({"embed_dim": 96, "depths": (2, 2, 17, 2), "num_heads": (3, 6, 12, 24)} | kwargs)
    )


@register_model
def vig_h_base(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-B, 88.9 M parameters."""
    return _create(
        "vig_h_base", pretrained, **({"embed_dim": 128, "depths": (2, 2, 17, 2), "num_heads": (4, 8, 16, 32)} | kwargs)
    )
