"""Tokens and RoPE permuted once per model call, instead of q, k, v once per attention call.

Letters: B batch, C channels, N visual tokens, D head dim.

* Three places are touched, none of them inside a transformer block: behind the patch embedding, behind the RoPE table (or on the way
  in, where the caller brings it), before the output norm. Blocks stay as they are for compilers, caches and gradient checkpointing.
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

from foveal.plugins.diffusers_host.grid import Layout
from foveal.plugins.diffusers_host.root_hook import Frame
from foveal.plugins.order import Order
from foveal.plugins.site import Grid


@dataclass(frozen=True)
class Recipe:
    """Where a family of models can be permuted: module names, and the dimension of N in their tensors.

    embed       modules that make tokens; embed_grid: they give [B, C, T, H, W] instead of [B, N, C]
    rope        the module that makes rotary tables, or None: positions are in the embedding
    rope_dim    dimension of N in the tables
    argument    the argument of the model that brings the tables [N, D], where no module makes them
    with_text   what starts with the text: "rope", its tables; "embed", the tokens
    tables      which of them are of visual tokens: "all", the "first" one, or those of their "length" (the module is called twice)
    out         the module that sees the tokens last
    modulation  the module that gives modulation per token, where there is one
    """

    embed: tuple[str, ...]
    out: str = "norm_out"
    embed_grid: bool = False
    rope: str | None = None
    rope_dim: int = 0
    argument: str | None = None
    with_text: str | None = None
    tables: str = "all"
    modulation: str | None = None

    @property
    def modules(self) -> list[str]:
        return [*self.embed, self.out, *(name for name in (self.rope, self.modulation) if name is not None)]


WAN: dict[str, Any] = {"embed_grid": True, "rope": "rope", "rope_dim": 1}
RECIPES = {
    "WanTransformer3DModel": Recipe(("patch_embedding",), modulation="condition_embedder", **WAN),
    "WanVACETransformer3DModel": Recipe(("patch_embedding", "vace_patch_embedding"), **WAN),
    "SkyReelsV2Transformer3DModel": Recipe(("patch_embedding",), **WAN),
    "HunyuanVideoTransformer3DModel": Recipe(("x_embedder",), rope="rope"),
    "HunyuanVideo15Transformer3DModel": Recipe(("x_embedder",), rope="rope"),
    "CogVideoXTransformer3DModel": Recipe(("patch_embed",), argument="image_rotary_emb", with_text="embed"),
    "LTXVideoTransformer3DModel": Recipe(("proj_in",), rope="rope", rope_dim=1),
    "FluxTransformer2DModel": Recipe(("x_embedder",), rope="pos_embed", with_text="rope"),
    "Flux2Transformer2DModel": Recipe(("x_embedder",), rope="pos_embed", tables="length"),
    "QwenImageTransformer2DModel": Recipe(("img_in",), rope="pos_embed", tables="first"),
    "SD3Transformer2DModel": Recipe(("pos_embed",)),
    "PixArtTransformer2DModel": Recipe(("pos_embed",)),
}
CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")
KWARGS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")


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
        self._joint: Tensor | None = None  # the same for what starts with the text
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
        self._joint = self._joint_rows(order, layout.text or 0)
        frame.ordered = True

    def arguments(self, call: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of this call with rotary tables in order, where a caller brings them; None: leave them."""
        name = None if self.recipe is None else self.recipe.argument
        if self._tokens is None or name is None or call.get(name) is None:
            return None
        return {**call, name: tuple(table.index_select(0, self._tokens) for table in call[name])}

    def _joint_rows(self, order: Order, text: int) -> Tensor:
        """Rows of what starts with the text; kept from call to call."""
        if self._known is None or self._known[0] is not order or self._known[1] != text:
            lead = torch.arange(text, device=order.token.device)
            self._known = (order, text, torch.cat((lead, order.token + text)))
        return self._known[2]

    def _rows(self, where: str) -> Tensor | None:
        """Rows of the tokens ("embed") or of the rotary tables ("rope"); None: hands off."""
        return self._joint if self.recipe is not None and self.recipe.with_text == where else self._tokens

    def end(self) -> None:
        self._tokens = self._inverse = self._joint = None

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderHook:
        return self  # a copy of the model is not accelerated, and its hooks do nothing

    def remove(self) -> None:
        for handle in self._undo:
            handle.remove()
        self._undo = []

    # ---- the hooks; each does nothing while the hook stands aside
    def after_embed(self, module: nn.Module, args: Any, x: Tensor) -> Tensor:
        rows = self._rows("embed")
        if rows is None:
            return x
        if x.ndim == 5:
            return x.flatten(2).index_select(2, rows).view(x.shape)
        return x.index_select(1, rows)

    def after_rope(self, module: nn.Module, args: Any, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        recipe, rows = self.recipe, self._rows("rope")
        if rows is None or recipe is None:
            return tables
        if recipe.tables == "length" and tables[0].shape[recipe.rope_dim] != len(rows):
            return tables
        visual = tables[:1] if recipe.tables == "first" else tables
        return (*(table.index_select(recipe.rope_dim, rows) for table in visual), *tables[len(visual) :])

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
    return recipe if all(isinstance(getattr(model, name, None), nn.Module) for name in recipe.modules) else None


def _register(model: nn.Module, recipe: Recipe, hook: OrderHook) -> list[Any]:
    undo = [getattr(model, name).register_forward_hook(hook.after_embed) for name in recipe.embed]
    undo.append(getattr(model, recipe.out).register_forward_pre_hook(hook.before_out))
    if recipe.rope:
        undo.append(getattr(model, recipe.rope).register_forward_hook(hook.after_rope))
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
    if any(call.get(name) is not None for name in CONTROLNET):
        return "ControlNet adds residuals in the model's own order"
    for name in KWARGS:
        strange = set(call.get(name) or {}) - {"scale"}
        if strange:
            return f"{name} passes {', '.join(sorted(strange))} to the attention layers"
    return _mixes_tokens(model, recipe, call, layout) or _odd_timesteps(recipe, call, layout)


def _mixes_tokens(model: nn.Module, recipe: Recipe, call: dict[str, Any], layout: Layout) -> str | None:
    """What in a model, or in a call, asks where tokens are, or cannot be told from text."""
    config, x, control = getattr(model, "config", None), call["hidden_states"], call.get("control_hidden_states")
    if getattr(config, "image_condition_type", None) == "token_replace":
        return "the blocks treat the first frame's tokens apart"
    if getattr(config, "num_frame_per_block", 1) > 1:
        return "frames see only earlier ones"
    if call.get("attention_mask") is not None:
        return "a mask names tokens by their place"
    if isinstance(control, Tensor) and control.shape[2:] != x.shape[2:]:
        return "the control video has another size"
    if recipe.tables == "length" and layout.text == layout.visual:
        return "there are as many text tokens as visual ones"
    return None


def _odd_timesteps(recipe: Recipe, call: dict[str, Any], layout: Layout) -> str | None:
    timestep = call.get("timestep")
    if not isinstance(timestep, Tensor) or timestep.ndim < 2:
        return None
    fits = recipe.modulation is not None and timestep.shape[1:] == (layout.visual,)
    return None if fits else "timesteps per token do not fit the grid"
