"""Models by name for rooms that do not name timm themselves: its registry with ours in it, and a ViT with one of our attention layers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import timm
from timm.models.vision_transformer import ATTN_LAYERS
from torch import nn

PREFIX = "foveal."


def create(name: str, **knobs: Any) -> nn.Module:
    """``timm.create_model`` with our models known to it; a layer that asks for a grid is told it. Errors are timm's."""
    importlib.import_module("foveal.vision")
    model: nn.Module = timm.create_model(name, **knobs)
    if "attn_layer" in knobs:
        from foveal.vision.token_layer import GridLayer, bind_grid

        if any(isinstance(module, GridLayer) for module in model.modules()):
            bind_grid(model)
    return model


def attention_layers(tokens: int | None = None) -> dict[str, type[nn.Module]]:
    """Our layers for ``attn_layer=``, by the name they have in timm's table without its prefix; LINA's linear attention among them.

    tokens   of the model, prefix tokens included, for layers that are made for one number of them
    """
    package = importlib.import_module("foveal.vision")
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        importlib.import_module(f"{package.__name__}.{found.name}")
    from foveal.vision.lina_attention import LinearAttention

    ours = {name.removeprefix(PREFIX): layer for name, layer in ATTN_LAYERS.items() if name.startswith(PREFIX)}
    return {"linear": LinearAttention, **{name: _told(layer, tokens) for name, layer in ours.items()}}


def _told(layer: type[nn.Module], tokens: int | None) -> type[nn.Module]:
    """The layer with the number of tokens, if it asks for one."""
    if tokens is None or "tokens" not in inspect.signature(layer).parameters:
        return layer
    told: type[nn.Module] = layer.with_options(tokens=tokens)  # type: ignore[attr-defined]
    return told
