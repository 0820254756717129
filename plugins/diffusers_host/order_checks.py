"""Why the tokens of one model call must stay where they are.

* What is asked: is everything between the patch embedding and the output norm per token, or attention, which does not mind the
  order? What a call brings (ControlNet residuals, masks, timesteps per token) may know tokens by their place.
* A reason ends the sentence "tokens are put in order at every attention call, because ...".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveal.plugins.diffusers_host.grid import Layout
from foveal.plugins.diffusers_host.order_recipes import NO_PLACE, PLACED, Recipe

CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")
KWARGS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")


def visual_input(call: dict[str, Any]) -> Any:
    """The visual tokens or latents of a model call: a tensor [B, ..], or a list of B of them (Z-Image)."""
    return call["hidden_states"] if "hidden_states" in call else call["x"]


def stands_aside(model: nn.Module, recipe: Recipe | None, call: dict[str, Any], layout: Layout) -> str | None:
    """Why the tokens of this call must stay where they are, or None."""
    if recipe is None:
        return PLACED.get(type(model).__name__, NO_PLACE)
    x = visual_input(call)
    if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] != layout.visual + layout.extra:
        return "the sequence does not fit the grid"
    if any(call.get(name) is not None for name in CONTROLNET):
        return "ControlNet adds residuals in the model's own order"
    for name in KWARGS:
        strange = set(call.get(name) or {}) - {"scale"}
        if strange:
            return f"{name} passes {', '.join(sorted(strange))} to the attention layers"
    return _mixes_tokens(model, recipe, call) or _odd_timesteps(recipe, call, layout)


def _mixes_tokens(model: nn.Module, recipe: Recipe, call: dict[str, Any]) -> str | None:
    """What in a model, or in a call, asks where tokens are."""
    config, control = getattr(model, "config", None), call.get("control_hidden_states")
    if getattr(config, "image_condition_type", None) == "token_replace":
        return "the blocks treat the first frame's tokens apart"
    if getattr(config, "num_frame_per_block", 1) > 1:
        return "frames see only earlier ones"
    if any(call.get(name) is not None for name in recipe.masks):
        return "a mask names tokens by their place"
    if isinstance(control, Tensor) and control.shape[2:] != visual_input(call).shape[2:]:
        return "the control video has another size"
    return None


def _odd_timesteps(recipe: Recipe, call: dict[str, Any], layout: Layout) -> str | None:
    """Timesteps that differ inside a sample reach the blocks as modulation per token, which must be in order too."""
    timestep, grid = call.get("timestep"), layout.grid
    if not isinstance(timestep, Tensor) or timestep.ndim < 2 or grid is None:
        return None
    each = timestep[0].numel()
    if each == {"tokens": layout.visual, "frames": grid[0]}.get(recipe.timesteps or ""):
        return None
    if each == grid[0]:
        return "the model spreads timesteps per frame over its tokens where no module shows them"
    return "timesteps per token do not fit the grid"
