"""What a layer needs to stand in a timm ViT as ``attn_layer=`` when it has to know where its tokens lie.

Letters: B batch, N tokens, P prefix tokens (class, registers), D width, h heads, d head dim, H rows and W columns of patches: N = P + H W.

* timm builds an attention layer without telling it the grid or the prefix tokens. ``bind_grid(model)`` tells all of a model's layers, once,
  and every picture's grid is then read from its patch embedding. Without it the tokens are taken as a square map without prefix tokens.
* Gradient checkpointing runs blocks again in the backward pass, maybe after pictures of another size: a hook on the gradient of each
  block's output brings the grid of that call back.
* ``Layer.with_options(...)`` makes the class that timm is given: timm wants a class, and passes only its own arguments.
* Names of weights are timm's, so checkpoints of plain ViTs load into what they have in common.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, TypeVar

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

Plane = tuple[int, int]
Model = TypeVar("Model", bound=nn.Module)


class TokenGrid:
    """Where the tokens of a model lie: ``prefix`` tokens, then ``grid`` (rows, columns) of the last picture, or None before the first.

    Its hooks are methods, so that a copied model has a grid of its own.
    """

    def __init__(self, prefix: int = 0):
        self.prefix = prefix
        self.grid: Plane | None = None

    def watch(self, embed: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook of the patch embedding."""
        image = arguments[0]
        if isinstance(image, torch.fx.Proxy):
            raise TypeError(
                "a model whose grid is bound cannot be traced symbolically, because the grid is read from pictures; trace it before "
                "bind_grid, or use torch.compile."
            )
        rows, columns = embed.dynamic_feat_size(tuple(image.shape[-2:]))  # type: ignore[operator]
        self.grid = (rows, columns)

    def keep(self, block: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
        """A forward hook of every block."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return  # compiled graphs know their sizes; blocks that run again have their hook already
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(functools.partial(self._again, self.grid))

    def _again(self, grid: Plane | None, gradient: Tensor) -> None:
        self.grid = grid


def bind_grid(model: Model) -> Model:
    """Tell every layer of a timm ViT its prefix tokens and, picture by picture, its grid. Returns the model; a second call changes nothing.

    Raises ``ValueError`` for a model that has none of these layers, or no patch embedding that says its grid (NaFlexViT has none).
    """
    layers = [module for module in model.modules() if isinstance(module, GridLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that asks for a grid; build it with attn_layer= one of the layers of foveal.vision."
        )
    embed: Any = getattr(model, "patch_embed", None)
    if not hasattr(embed, "dynamic_feat_size"):
        raise ValueError(
            f"{type(model).__name__} has no patch_embed that says its grid; pass grid= to the layers, or use a VisionTransformer of timm."
        )
    bound = layers[0].where
    if not any(getattr(hook, "__self__", None) is bound for hook in embed._forward_pre_hooks.values()):
        bound = TokenGrid(getattr(model, "num_prefix_tokens", 0))
        embed.register_forward_pre_hook(bound.watch)
        for block in getattr(model, "blocks", ()):
            block.register_forward_hook(bound.keep)
    for layer in layers:
        layer.where = bound
    return model


@register_notrace_module
class GridLayer(nn.Module):
    """Knows its grid and its prefix tokens, and refuses what it cannot do."""

    def __init__(self, num_prefix_tokens: int = 0):
        super().__init__()
        self.where = TokenGrid(num_prefix_tokens)

    @classmethod
    def with_options(cls, **options: Any) -> Any:
        """The class with other defaults, for ``timm.create_model(..., attn_layer=Layer.with_options(...))``.

        Raises ``ValueError`` for an option that the class does not have.
        """
        known = [
            name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "dim", "num_heads")
        ]
        for name in options:
            if name not in known:
                raise ValueError(f"{cls.__name__} has no option {name!r}; it has {', '.join(known)}.")
        init = functools.partialmethod(cls.__init__, **options)
        return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__, "__doc__": cls.__doc__})

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"{type(self).__name__} cannot be turned into TorchScript, because its grid is known only while it runs; use torch.compile "
            "instead."
        )

    def locate(self, tokens: int, grid: Plane | None = None) -> tuple[int, Plane]:
        """-> prefix tokens, and the grid of the others: the one given, else the picture's, else a square.

        Raises ``ValueError`` when the tokens do not form it.
        """
        prefix = self.where.prefix
        plane = self.where.grid if grid is None else grid
        if plane is None:
            side = math.isqrt(max(0, tokens - prefix))
            if side == 0 or side * side + prefix != tokens:
                raise ValueError(
                    f"{tokens} tokens do not form a square grid plus {prefix} prefix tokens; call foveal.vision.bind_grid(model) "
                    "once, or pass grid=(rows, columns)."
                )
            return prefix, (side, side)
        if plane[0] * plane[1] + prefix != tokens:
            raise ValueError(
                f"{tokens} tokens do not form a grid of {plane[0]} by {plane[1]} plus {prefix} prefix tokens; pass the grid they come "
                "from, and switch patch dropout off."
            )
        return prefix, plane

    def refuse_masks(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        if attn_mask is not None or is_causal:
            what = "causal order" if is_causal else "attention mask"
            raise NotImplementedError(f"{type(self).__name__} takes no {what}; leave it away, or use timm's Attention.")


class TokenAttention(GridLayer):
    """The parts of timm's ``Attention``: qkv, q_norm, k_norm, attn_drop, norm, proj, proj_drop. [B, N, D] -> [B, N, D].

    Raises ``ValueError`` for a width that the heads do not divide, and for norms without ``norm_layer``.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, qk_norm: bool = False, scale_norm: bool = False,
        proj_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, num_prefix_tokens: int = 0,
        device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__(num_prefix_tokens)
        check_heads(dim, num_heads)
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError(
                "qk_norm and scale_norm need norm_layer, the class of the norms; give one, such as torch.nn.LayerNorm."
            )
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def dropout(self) -> float:
        return self.attn_drop.p if self.training else 0.0

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> q, k (after their norms), v, each [B, h, N, d]"""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def finish(self, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """out [B, N, D], gate [B, N, D] or None -> [B, N, D]"""
        out = self.norm(out)
        return self.proj_drop(self.proj(out if gate is None else out * gate))


def check_heads(dim: int, num_heads: int, multiple: int = 1) -> None:
    """Raises ``ValueError`` where the width cannot be shared out."""
    if num_heads < 1 or dim % (multiple * num_heads):
        times = f"{multiple} times " if multiple > 1 else ""
        raise ValueError(f"the width {dim} is not divisible by {times}{num_heads} heads; choose heads that divide it.")


def with_prefix(x: Tensor, prefix: int) -> Tensor:
    """[B, N - P, D] -> [B, N, D], zeros for the prefix tokens"""
    return nn.functional.pad(x, (0, 0, prefix, 0)) if prefix else x
