"""Entering a diffusers pipeline or model: every denoiser in it, all or nothing, and its scheduler followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from foveal.plugins.accelerate import AccelerateError, Layers
from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.attach import Attachment, attached
from foveal.plugins.diffusers_host.scheduler import SchedulerFollower
from foveal.plugins.handle import Handle
from foveal.plugins.method import Method

COMPONENTS = ("transformer", "transformer_2", "unet")


def open_handle(target: Any, method: Method, *, layers: Layers = None, roles: Sequence[str] | None = None) -> Handle:
    """Enter every denoiser of a pipeline, or one model; all or nothing."""
    private.require_contract()
    handle = Handle(method)
    handle.enter([Attachment(model, name, method, handle.record) for name, model in parts(target)], layers, roles)
    if private.is_pipeline(target):
        follower = SchedulerFollower(target, handle.attachments)
        handle.undo.append(follower.remove)
        for attachment in handle.attachments:
            attachment.tracker.scheduler = follower.current
    return handle


def find_handle(target: Any) -> Handle | None:
    for _, model in parts(target):
        attachment = attached(getattr(model, "_orig_mod", model))
        if attachment is not None:
            return attachment.handle
    return None


def parts(target: Any) -> list[tuple[str, nn.Module]]:
    """(component name, model) pairs: the denoisers of a pipeline, or the model itself under an empty name."""
    if not private.is_pipeline(target):
        return [("", target)]
    parts = [(name, getattr(target, name, None)) for name in COMPONENTS]
    found = [(name, model) for name, model in parts if isinstance(model, nn.Module)]
    if not found:
        raise AccelerateError(f"{type(target).__name__} has none of {', '.join(COMPONENTS)}; give the model itself.")
    return found
