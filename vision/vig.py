"""ViG, plain: a classifier with the shape of a ViT whose token mixer is linear in the number of tokens. In timm's registry.

Letters: B batch, N tokens, D width. Source: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention".

Notable choices: module names are those of the released checkpoints; any image size (positions are resampled); ``pos_embed`` has no
weight decay (the authors decay it); TorchScript is refused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from foveal.kernels.token_mixing.stem import patch_conv, takes_patch_conv
from foveal.vision.head import check_head
from foveal.vision.vig_block import Block
from foveal.vision.vig_checkpoint import checkpoint_filter_fn
from foveal.vision.vig_mixer import BidirectionalMixer, RMSNorm, untouched
from foveal.vision.vig_position import resample

SMALLEST = 7  # pixels a side: the stem's output is then one token


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Tokens down and across for an image of that many pixels."""
    one = lambda n: ((n + 2 - 9) // 8 + 1 + 2 - 3) // 2 + 1  # noqa: E731
    return one(height), one(width)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Image [B, in_chans, h, w] -> [B, D, h / 16, w / 16], by two convolutions."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 9, stride=8, padding=1, **dd),
            LayerNorm2d(dim // 2, eps=1e-5, **dd),
            nn.SiLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            LayerNorm2d(dim, eps=1e-5, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < SMALLEST:
            raise ValueError(f"the image is {tuple(x.shape[-2:])} pixels; at least {SMALLEST} on each side are needed.")
        conv, norm = cast(nn.Conv2d, self.proj[0]), cast(nn.LayerNorm, self.proj[1])
        weights = conv.weight, cast(Tensor, conv.bias), norm.weight, norm.bias
        if untouched(conv) and takes_patch_conv(x, *weights):
            return self.proj[4](self.proj[3](patch_conv(x, *weights, 8, 1, norm.eps)))
        return self.proj(x)


class ViG(nn.Module):
    """The plain model. timm's contract for models of tokens without prefix tokens.

    img_size       pixels of the grid that positions are stored for; images of any size are accepted
    eval_half      see ``BidirectionalMixer``
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        embed_dim: int = 192, depth: int = 12, num_heads: int = 3, conv_act: bool = False, out_act: bool = False, eval_half: bool = False,
        drop_rate: float = 0.0, drop_path_rate: float = 0.0, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        check_head(num_classes, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.global_pool, self.in_chans = num_classes, global_pool, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.grad_checkpointing = 0, False
        self.grid_size = grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], embed_dim, **dd))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        mixer = {"conv_act": conv_act, "out_act": out_act, "eval_half": eval_half}
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate, dd, **mixer) for rate in rates)
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": 16} for i in range(depth)]
        self.norm: nn.Module = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers normal with deviation 0.02, then each mixer its own; the stem keeps PyTorch's."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, BidirectionalMixer):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = self.pos_embed
        fresh = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        self.head = fresh

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Store positions for another image size."""
        grid = grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        with torch.no_grad():
            self.pos_embed = nn.Parameter(resample(self.pos_embed, self.grid_size, *grid).clone())
        self.grid_size = grid

    def _tokens(self, x: Tensor) -> tuple[Tensor, Any, Any]:
        x = self.patch_embed(x)
        height, width = x.shape[-2], x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        return x + resample(self.pos_embed, self.grid_size, height, width).to(x.dtype), height, width

    def _block(self, block: nn.Module, x: Tensor, height: Any, width: Any) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, x, height, width)
        return block(x, height, width)

    def forward_features(self, x: Tensor) -> Tensor:
        """-> [B, N, D], normalised."""
        x, height, width = self._tokens(x)
        for block in self.blocks:
            x = self._block(block, x, height, width)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "avg":
            x = x.mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Outputs of the blocks at ``indices`` (the last n, or a list): NCHW maps or NLC tokens; and the final output."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is unknown; choose 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, height, width = self._tokens(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._block(block, x, height, width)
            if i in take:
                y = self.norm(x) if norm else x
                found.append(y if output_fmt == "NLC" else y.transpose(1, 2).unflatten(2, (height, width)).contiguous())
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _cfg(**extra: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj.0", "classifier": "head",
        "paper_ids": "arXiv:2405.18425", "paper_name": "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        "origin_url": "https://github.com/hustvl/ViG", **extra,
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "vig_tiny_patch16_224.untrained": _cfg(),
        "vig_small_patch16_224.untrained": _cfg(),
        "vig_base_patch16_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ViG:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        ViG, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"}, **kwargs,
    )  # fmt: skip


@register_model
def vig_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-T, 5.8 M parameters: the one size with both activations."""
    return _create(
        "vig_tiny_patch16_224",
        pretrained,
        **({"embed_dim": 192, "num_heads": 3, "conv_act": True, "out_act": True} | kwargs),
    )


@register_model
def vig_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-S, 22.6 M parameters."""
    return _create("vig_small_patch16_224", pretrained, **({"embed_dim": 384, "num_heads": 6} | kwargs))


@register_model
def vig_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-B, 89.0 M parameters."""
    return _create("vig_base_patch16_224", pretrained, **({"embed_dim": 768, "num_heads": 12} | kwargs))
