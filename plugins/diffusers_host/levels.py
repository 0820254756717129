"""The levels of a UNet: each has its own grid, which the input of its transformer shows.

Letters: B batch, C channels, H, W pixels of the level.

* A level is a module that holds ``transformer_blocks`` and takes ``hidden_states`` [B, C, H, W]; one that takes ``num_frames`` too
  is a motion module, which attends over frames at every pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from foveal.plugins.diffusers_host.grid import Layout, nothing
from foveal.plugins.diffusers_host.layer import Layer
from foveal.plugins.diffusers_host.root_hook import Binder
from foveal.plugins.diffusers_host.structure import parameters_of


def watch_levels(model: nn.Module, layers: Sequence[Layer]) -> list[Callable[[], Any]]:
    """Tell the layers of every level its grid before they run; -> what undoes it."""
    undo: list[Callable[[], Any]] = []
    for name, module in model.named_modules():
        inside = [layer for layer in layers if layer.name.startswith(f"{name}.transformer_blocks.")]
        if name and inside and isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList):
            hook = partial(_tell, Binder(parameters_of(type(module))), inside)
            undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return undo


def _tell(bind: Binder, layers: list[Layer], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = bind(args, kwargs)
    x, frames = call.get("hidden_states"), call.get("num_frames")
    if x is None or x.ndim != 4:
        layout = nothing("the input of this level is no picture")
    else:
        layout = Layout((1, *x.shape[-2:]) if frames is None else (int(frames), 1, 1), text=0)
    for layer in layers:
        layer.local = layout
