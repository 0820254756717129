"""Entering a timm model: every ViT in it, all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from foveal.plugins.accelerate import AccelerateError, Layers
from foveal.plugins.handle import Handle
from foveal.plugins.method import Method
from foveal.plugins.timm_host.attach import Attachment, attached, grouped
from foveal.plugins.timm_host.recognise import attention_modules, original_class, roots, why_not

NO_ROOT = "it does not keep one grid of patches through all its blocks (patch_embed, blocks, num_prefix_tokens)"
STAGES = "its tokens are not that grid"


def open_handle(
    target: nn.Module, method: Method, *, layers: Layers = None, roles: Sequence[str] | None = None
) -> Handle:
    """Enter every ViT of a model (itself, or a backbone inside it). Raises ``AccelerateError`` where there is none."""
    model = plain(target)
    found = roots(model)
    if not found:
        raise AccelerateError(_no_root(model))
    handle = Handle(method)
    handle.enter([Attachment(root, name, method, handle.record) for name, root in found.items()], layers, roles)
    return handle


def find_handle(target: nn.Module) -> Handle | None:
    for root in roots(plain(target)).values():
        attachment = attached(root)
        if attachment is not None:
            return attachment.handle
    return None


def plain(target: Any) -> nn.Module:
    """The model inside a compiled one."""
    return getattr(target, "_orig_mod", target)


def _no_root(model: nn.Module) -> str:
    layers = {name: why_not(module) or STAGES for name, module in attention_modules(model).items()}
    why = grouped(model, layers)
    return f"{original_class(model).__name__} is left as it is, because {NO_ROOT}: {why}."
