"""Tokens and RoPE permuted once per model call, instead of q, k, v once per attention call.

Letters: B batch, C channels, N visual tokens, M those with the reference or padding tokens behind them, D head dim.

* Three places are touched, none of them inside a transformer block: behind the patch embedding, behind the RoPE table (or on the way
  in, where the caller brings it), before the output norm. Blocks stay as they are for compilers, caches and gradient checkpointing.
* Everything between is per token, or attention, which does not mind the order. Where it is not (first-frame tokens replaced,
  ControlNet residuals, IP adapters), the hook stands aside, says why, and plans carry the order instead.
* Only the tokens of the grid move: text, reference pictures and padding keep their places.
* Modulation per token (Wan 2.2 TI2V, LTX image-to-video) is permuted with the tokens; the output norm sees both in the model's order.
* A UNet has no such places: each of its levels has (see levels.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveal.plugins.diffusers_host.grid import Layout
from foveal.plugins.diffusers_host.order_checks import stands_aside, visual_input
from foveal.plugins.diffusers_host.order_recipes import RECIPES, Recipe, parts_of, recipe_of
from foveal.plugins.diffusers_host.root_hook import Frame
from foveal.plugins.order import Order
from foveal.plugins.site import Grid


@dataclass(frozen=True)
class Rows:
    """Where each position's token comes from, int64: of the visual tokens [M], of what starts with the text, and of the way back."""

    visual: Tensor
    joint: Tensor
    back: Tensor

    @staticmethod
    def of(order: Order, layout: Layout, out_text: bool) -> Rows:
        """out_text: the output norm sees the text behind the visual tokens."""
        text, tokens = layout.text or 0, layout.visual + layout.extra
        place = torch.arange(text + tokens, device=order.token.device)  # what keeps its place
        visual = torch.cat((order.token, place[layout.visual : tokens]))
        back = torch.cat((order.inverse, place[layout.visual : tokens + out_text * text]))
        return Rows(visual, torch.cat((place[:text], visual + text)), back)


class OrderHook:
    """Permutes the tokens of a model call when its method has a static order and nothing speaks against it.

    enabled   False leaves the order to the plans
    note      told once why the hook stands aside
    """

    def __init__(
        self,
        model: nn.Module,
        order: Callable[[Grid], Order | None],
        note: Callable[[str], None],
        recipes: dict[str, Recipe] = RECIPES,
    ) -> None:
        self.model, self.order, self.note = model, order, note
        self.enabled = True
        self.recipe = recipe_of(model, recipes)
        self._rows: Rows | None = None  # None: hands off
        self._samples = 1
        self._tables = 0  # times that tables were made in this model call
        self._known: tuple[Order, Layout, Rows] | None = None
        self._undo = [] if self.recipe is None else _register(model, self.recipe, self)

    def begin(self, call: dict[str, Any], frame: Frame) -> None:
        """Decide for one model call; sets ``frame.ordered``."""
        self.end()
        frame.ordered = False
        layout = frame.layout
        order = self.order(layout.grid) if layout.grid is not None and self.enabled else None
        if order is None or order.identity:
            return
        why = stands_aside(self.model, self.recipe, call, layout)
        if why is not None:
            self.note(f"{type(self.model).__name__}: tokens are put in order at every attention call, because {why}.")
            return
        x = visual_input(call)
        self._samples = len(x)
        self._rows = self._rows_of(order.on(x[0].device), layout)
        frame.ordered = True

    def _rows_of(self, order: Order, layout: Layout) -> Rows:
        """Kept from call to call."""
        assert self.recipe is not None
        if self._known is None or self._known[0] is not order or self._known[1] != layout:
            self._known = (order, layout, Rows.of(order, layout, self.recipe.out_text))
        return self._known[2]

    def arguments(self, call: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of this call with rotary tables in order, where a caller brings them; None: leave them."""
        name = None if self.recipe is None else self.recipe.argument
        if self._rows is None or name is None or call.get(name) is None:
            return None
        return {**call, name: tuple(table.index_select(0, self._rows.visual) for table in call[name])}

    def end(self) -> None:
        self._rows, self._tables = None, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderHook:
        return self  # a copy of the model is not accelerated, and its hooks do nothing

    def remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    # ---- the hooks; each does nothing while the hook stands aside
    def after_embed(self, module: nn.Module, args: Any, x: Tensor) -> Tensor:
        if self._rows is None or self.recipe is None:
            return x
        return self._moved(x, self._rows.joint if self.recipe.with_text == "embed" else self._rows.visual)

    def after_rope(self, module: Any, args: Any, tables: Any) -> Any:
        recipe = self.recipe
        if self._rows is None or recipe is None:
            return tables
        self._tables += 1
        if recipe.rope_call is not None and recipe.rope_call != self._tables - 1:
            return tables
        rows = self._rows.joint if recipe.with_text == "rope" else self._rows.visual
        move = partial(moved, rows=rows, dim=recipe.rope_dim)
        if isinstance(tables, Tensor):
            return move(tables)
        if isinstance(tables, dict):
            return {name: move(table) for name, table in tables.items()}
        visual = tables[:1] if recipe.tables == "first" else tables
        return (*(move(table) for table in visual), *tables[len(visual) :])

    def after_modulation(self, module: nn.Module, args: Any, out: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._rows is None or self.recipe is None:
            return out
        at, rows = self.recipe.modulated, self._rows.visual
        if out[at].shape[:-1].numel() != self._samples * len(rows):  # one timestep per sample
            return out
        return (*out[:at], self._moved(out[at], rows), *out[at + 1 :])

    def before_out(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self._rows is None else (self._moved(args[0], self._rows.back), *args[1:])

    def _moved(self, x: Tensor, rows: Tensor) -> Tensor:
        """Tokens [.., C], or [B, C, (T,) H, W] where the recipe says so."""
        if x.ndim > 3 and self.recipe is not None and self.recipe.embed_grid:
            return x.flatten(2).index_select(2, rows).view(x.shape)
        if x.ndim == 3 and x.shape[1] == len(rows):
            return x.index_select(1, rows)
        return moved(x.flatten(0, -2), rows, 0).view(x.shape)


def moved(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """``rows`` of a dimension; where samples lie one behind the other in it, those of each."""
    dim %= x.ndim
    return x.unflatten(dim, (-1, len(rows))).index_select(dim + 1, rows).flatten(dim, dim + 1)


class _Watched:
    """Stands for a callable of a model that is no module. A deep copy of the model gets the plain callable back."""

    def __init__(self, original: Callable[..., Any], after: Callable[[Any, Any, Any], Any]) -> None:
        self.original, self.after = original, after

    def __call__(self, *args: Any) -> Any:
        return self.after(self.original, args, self.original(*args))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)


def _register(model: nn.Module, recipe: Recipe, hook: OrderHook) -> list[Callable[[], Any]]:
    """Put the hooks in; -> what takes them out."""
    undo: list[Callable[[], Any]] = []
    for names, after in ((recipe.embed, hook.after_embed), (recipe.modulation, hook.after_modulation)):
        undo += [part.register_forward_hook(after).remove for name in names for part in parts_of(model, name)]
    undo += [part.register_forward_pre_hook(hook.before_out).remove for part in parts_of(model, recipe.out)]
    for name in recipe.rope:
        for part in parts_of(model, name):
            undo.append(_watch(model, name, part, hook.after_rope))
    return undo


def _watch(model: nn.Module, name: str, part: Any, after: Callable[..., Any]) -> Callable[[], Any]:
    if isinstance(part, nn.Module):
        return part.register_forward_hook(after).remove
    setattr(model, name, _Watched(part, after))
    return partial(setattr, model, name, part)
