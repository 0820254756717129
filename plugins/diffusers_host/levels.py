"""The levels of a UNet: each has its own grid, which the input of its transformer shows.

Letters: B batch, C channels, H, W pixels of the level.

* A level is a module that holds ``transformer_blocks`` and takes ``hidden_states`` [B, C, H, W]; one that takes ``num_frames`` too
  is a motion module, which attends over frames at every pixel.
* Tokens are put in the method's order once per level and call, between its projections (order_hook.py). Across levels they cannot
  stay so: convolutions look at neighbours, and every level has another grid.
* In a graph of the whole UNet the telling is an operator that the level's input passes through: what Python does there would happen
  only after the graph has run, one call late. Orders are left to the plans there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveal.plugins.diffusers_host.grid import Layout, nothing
from foveal.plugins.diffusers_host.layer import Layer
from foveal.plugins.diffusers_host.order_hook import OrderHook
from foveal.plugins.diffusers_host.root_hook import Binder, Frame
from foveal.plugins.diffusers_host.structure import parameters_of
from foveal.plugins.in_graphs import layers_of

INPUT = "hidden_states"


def watch_levels(
    model: nn.Module, layers: Sequence[Layer], order_hook: Callable[[nn.Module], OrderHook]
) -> list[Callable[[], Any]]:
    """Tell the layers of every level its grid before they run, and put its tokens in order; -> what undoes it."""
    undo: list[Callable[[], Any]] = []
    for name, module in model.named_modules():
        inside = [layer for layer in layers if layer.name.startswith(f"{name}.transformer_blocks.")]
        if name and inside and isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList):
            tickets = torch.stack([layer.ticket for layer in inside])
            order = order_hook(module)
            before = partial(_before_level, Binder(parameters_of(type(module))), inside, tickets, order)
            undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.append(module.register_forward_hook(partial(_after_level, order)).remove)
            undo.append(order.remove)
    return undo


def _before_level(
    bind: Binder,
    layers: list[Layer],
    tickets: Tensor,
    order: OrderHook,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    call = bind(args, kwargs)
    x, frames = call.get(INPUT), call.get("num_frames")
    if not torch.compiler.is_compiling() or x is None:
        frame = Frame(layout=_tell(layers, x, frames))
        order.begin(call, frame)
        for layer in layers:
            layer.local_ordered = frame.ordered
        return None
    x, at = tell_in_graph(x, frames, tickets), bind.names.index(INPUT)
    return (args, {**kwargs, INPUT: x}) if INPUT in kwargs else ((*args[:at], x, *args[at + 1 :]), kwargs)


def _after_level(order: OrderHook, module: nn.Module, args: Any, out: Any) -> None:
    if not torch.compiler.is_compiling():
        order.end()


def _tell(layers: Sequence[Layer], x: Tensor | None, frames: int | None) -> Layout:
    if x is None or x.ndim != 4:
        layout = nothing("the input of this level is no picture")
    else:
        layout = Layout((1, *x.shape[-2:]) if frames is None else (int(frames), 1, 1), text=0)
    for layer in layers:
        layer.local, layer.local_ordered = layout, False
    return layout


@torch.library.custom_op("foveal::tell_level", mutates_args=())
def tell_in_graph(x: Tensor, frames: int | None, tickets: Tensor) -> Tensor:
    """A copy of x, made after the layers with these tickets know its grid."""
    _tell(layers_of(tickets), x, frames)
    return x.clone()


@tell_in_graph.register_fake
def _(x: Tensor, frames: int | None, tickets: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    return None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


tell_in_graph.register_autograd(_backward, setup_context=_setup)
