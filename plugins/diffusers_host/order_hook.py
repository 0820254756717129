"""Tokens and RoPE permuted once per model call, instead of q, k, v once per attention call.

Letters: B batch, C channels, N visual tokens, D head dim.

* Three places are touched, none of them inside a transformer block: behind the patch embedding, behind the RoPE table, before the
  output norm. Blocks stay as they are for compilers, caches and gradient checkpointing.
* Everything between is per token, or attention, which does not mind the order. Where it is not (first-frame tokens replaced,
  ControlNet residuals, IP adapters), the hook stands aside, says why, and plans carry the order instead.
* Modulation per token (Wan 2.2 TI2V) is permuted with the tokens; the output norm sees both in the model's own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.plugins.diffusers_host.root_hook import Frame
from foveal.plugins.order import Order
from foveal.plugins.site import Grid


@dataclass(frozen=True)
class Recipe:
    """Where a family of models can be permuted: module names, and the dimension of N in their tensors."""

    embed: str
    embed_grid: bool  # the embedding gives [B, C, T, H, W] instead of [B, N, C]
    rope: str
    rope_dim: int
    out: str
    modulation: str | None = None


RECIPES = {
    "WanTransformer3DModel": Recipe("patch_embedding", True, "rope", 1, "norm_out", "condition_embedder"),
    "FluxTransformer2DModel": Recipe("x_embedder", False, "pos_embed", 0, "norm_out"),
    "HunyuanVideoTransformer3DModel": Recipe("x_embedder", False, "rope", 0, "norm_out"),
    "HunyuanVideo15Transformer3DModel": Recipe("x_embedder", False, "rope", 0, "norm_out"),
}


class OrderHook:
    """Permutes the tokens of a model call when its method has a static order and nothing speaks against it.

    enabled   False leaves the order to the plans
    note      told once why the hook stands aside
    """

    def __init__(self, model: nn.Module, order: Callable[[Grid], Order | None], note: Callable[[str], None]) -> None:
        self.model, self.order, self.note = model, order, note
        self.enabled = True
        self.recipe = _recipe(model)
        self._tokens: Tensor | None = None  # int64 [N]: where each position's token comes from; None: hands off
        self._inverse: Tensor | None = None
        self._rope: Tensor | None = None  # the same for the RoPE table, text rows included
        self._known: tuple[Order, int, Tensor] | None = None
        self._undo = [] if self.recipe is None else _register(model, self.recipe, self)

    def begin(self, call: dict[str, Any], frame: Frame) -> None:
        """Decide for one model call; sets ``frame.ordered``."""
        self.end()
        frame.ordered = False
        layout = frame.layout
        order = self.order(layout.grid) if layout.grid is not None and self.enabled else None
        if order is None or order.identity:
            return
        why = stands_aside(self.model, self.recipe, call, frame)
        if why is not None:
            self.note(f"{type(self.model).__name__}: tokens are put in order at every attention call, because {why}.")
            return
        order = order.on(call["hidden_states"].device)
        self._tokens, self._inverse = order.token, order.inverse
        self._rope = self._rope_rows(order, layout.text or 0 if layout.text_first else 0)
        frame.ordered = True

    def _rope_rows(self, order: Order, text: int) -> Tensor:
        """Rows of the RoPE table, which may start with text; kept from call to call."""
        if self._known is None or self._known[0] is not order or self._known[1] != text:
            lead = torch.arange(text, device=order.token.device)
            self._known = (order, text, torch.cat((lead, order.token + text)))
        return self._known[2]

    def end(self) -> None:
        self._tokens = self._inverse = self._rope = None

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderHook:
        return self  # a copy of the model is not accelerated, and its hooks do nothing

    def remove(self) -> None:
        for handle in self._undo:
            handle.remove()
        self._undo = []

    # ---- the hooks; each does nothing while the hook stands aside
    def after_embed(self, module: nn.Module, args: Any, x: Tensor) -> Tensor:
        if self._tokens is None:
            return x
        if x.ndim == 5:
            return x.flatten(2).index_select(2, self._tokens).view(x.shape)
        return x.index_select(1, self._tokens)

    def after_rope(self, module: nn.Module, args: Any, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._rope is None or self.recipe is None:
            return tables
        return tuple(table.index_select(self.recipe.rope_dim, self._rope) for table in tables)

    def after_modulation(self, module: nn.Module, args: Any, out: tuple[Any, ...]) -> tuple[Any, ...]:
        temb, projection, *rest = out
        if self._tokens is None or projection.ndim != 3:  # [B, 6 C]: one timestep per sample
            return out
        return (temb, projection.index_select(1, self._tokens), *rest)

    def before_out(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._inverse is None:
            return args
        return (args[0].index_select(1, self._inverse), *args[1:])


def _recipe(model: nn.Module) -> Recipe | None:
    """The recipe of exactly this class (a subclass may mix tokens elsewhere), if its modules are where we think."""
    recipe = RECIPES.get(type(model).__name__)
    if recipe is None:
        return None
    names = [recipe.embed, recipe.rope, recipe.out, *([recipe.modulation] if recipe.modulation else [])]
    return recipe if all(isinstance(getattr(model, name, None), nn.Module) for name in names) else None


def _register(model: nn.Module, recipe: Recipe, hook: OrderHook) -> list[Any]:
    undo = [
        getattr(model, recipe.embed).register_forward_hook(hook.after_embed),
        getattr(model, recipe.rope).register_forward_hook(hook.after_rope),
        getattr(model, recipe.out).register_forward_pre_hook(hook.before_out),
    ]
    if recipe.modulation:
        undo.append(getattr(model, recipe.modulation).register_forward_hook(hook.after_modulation))
    return undo


def stands_aside(model: nn.Module, recipe: Recipe | None, call: dict[str, Any], frame: Frame) -> str | None:
    """Why the tokens of this call must stay where they are, or None."""
    layout = frame.layout
    if recipe is None:
        return "this model has no place to permute them once"
    if layout.extra:
        return "there are reference or padding tokens"
    x = call["hidden_states"]
    if x.ndim == 3 and x.shape[1] != layout.visual:
        return "the sequence does not fit the grid"
    if call.get("controlnet_block_samples") is not None or call.get("controlnet_single_block_samples") is not None:
        return "ControlNet adds residuals in the model's own order"
    strange = set(call.get("joint_attention_kwargs") or {}) - {"scale"}
    if strange:
        return f"joint_attention_kwargs passes {', '.join(sorted(strange))} to the attention layers"
    if getattr(getattr(model, "config", None), "image_condition_type", None) == "token_replace":
        return "the blocks treat the first frame's tokens apart"
    timestep = call.get("timestep")
    if (
        isinstance(timestep, Tensor)
        and timestep.ndim > 1
        and (not recipe.modulation or timestep.shape[1:] != (layout.visual,))
    ):
        return "timesteps per token do not fit the grid"
    return None
