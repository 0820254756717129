"""Where models of diffusers can be permuted once per call, as data; and why the others cannot.

Letters: B batch, C channels, T, H, W the token grid, N visual tokens, D head dim.

* A recipe is kept for exactly one class: a subclass may mix tokens elsewhere.
* A model needs no recipe to be accelerated: without one, every attention call puts its own queries, keys and values in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Where a class of models can be permuted: module names, and the dimension of N in their tensors.

    embed       modules that make tokens [.., C], samples one behind the other; one that a model was made without (None) is skipped
    embed_grid  they give [B, C, (T,) H, W] instead; so may what the output module takes
    rope        what makes rotary tables, modules or plain callables; none: positions are in the embedding
    rope_dim    dimension of N in the tables
    rope_call   which call of it, in every model call, is of the visual tokens; None: every one
    argument    the argument of the model that brings the tables [N, D], where no module makes them
    with_text   what starts with the text: "rope", its tables; "embed", the tokens
    tables      which of them are of visual tokens: "all", or the "first" one
    out         the module that sees the tokens last; out_text: with the text behind them
    modulation  modules that give modulation, per token where timesteps are
    modulated   which of their outputs the blocks take
    timesteps   what a model call may tell them apart by, if anything: "tokens" or "frames"
    masks       arguments that name visual tokens by their place
    """

    embed: tuple[str, ...]
    out: str = "norm_out"
    out_text: bool = False
    embed_grid: bool = False
    rope: tuple[str, ...] = ()
    rope_dim: int = 0
    rope_call: int | None = None
    argument: str | None = None
    with_text: str | None = None
    tables: str = "all"
    modulation: tuple[str, ...] = ()
    modulated: int = 1
    timesteps: str | None = None
    masks: tuple[str, ...] = ("attention_mask",)


WAN: dict[str, Any] = {"embed_grid": True, "rope": ("rope",), "rope_dim": 1}
WAN_TIMES: dict[str, Any] = {"modulation": ("condition_embedder",), "timesteps": "tokens"}
LTX: dict[str, Any] = {"modulated": 0, "timesteps": "tokens"}
LTX2_TIMES = ("time_embed", "av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate")
LTX2_MASKS = ("video_self_attention_mask", "video_keyframes_mask")
FLUX = Recipe(("x_embedder",), rope=("pos_embed",), with_text="rope")
HUNYUAN = Recipe(("x_embedder",), rope=("rope",))
COGVIDEOX = Recipe(("patch_embed",), argument="image_rotary_emb", with_text="embed")
RECIPES = {
    "WanTransformer3DModel": Recipe(("patch_embedding",), **WAN, **WAN_TIMES),
    "WanVACETransformer3DModel": Recipe(("patch_embedding", "vace_patch_embedding"), **WAN),
    "ChronoEditTransformer3DModel": Recipe(("patch_embedding",), **WAN, **WAN_TIMES),
    "SkyReelsV2Transformer3DModel": Recipe(("patch_embedding",), **WAN),
    "AnyFlowTransformer3DModel": Recipe(
        ("patch_embedding",), **{**WAN, "rope_dim": 2}, **{**WAN_TIMES, "timesteps": "frames"}
    ),
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    "HunyuanVideo15Transformer3DModel": HUNYUAN,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "ConsisIDTransformer3DModel": COGVIDEOX,
    "MochiTransformer3DModel": Recipe(("patch_embed",), rope=("rope",)),
    "CosmosTransformer3DModel": Recipe(("patch_embed", "learnable_pos_embed"), rope=("rope",), masks=()),
    "LTXVideoTransformer3DModel": Recipe(("proj_in",), rope=("rope",), rope_dim=1, modulation=("time_embed",), **LTX),
    "LTX2VideoTransformer3DModel": Recipe(
        ("proj_in",), rope=("rope", "cross_attn_rope"), rope_dim=-2, modulation=LTX2_TIMES, masks=LTX2_MASKS, **LTX
    ),
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": FLUX,
    "BriaTransformer2DModel": FLUX,
    "BriaFiboTransformer2DModel": FLUX,
    "LongCatImageTransformer2DModel": FLUX,
    "OvisImageTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": Recipe(("x_embedder",), rope=("pos_embed",), rope_call=0),
    "QwenImageTransformer2DModel": Recipe(("img_in",), rope=("pos_embed",), tables="first"),
    "ZImageTransformer2DModel": Recipe(
        ("all_x_embedder",), out="all_final_layer", out_text=True, rope=("rope_embedder",), rope_call=0
    ),
    "SD3Transformer2DModel": Recipe(("pos_embed",)),
    "PixArtTransformer2DModel": Recipe(("pos_embed",)),
    "Transformer2DModel": Recipe(("pos_embed",)),
}
# Levels of UNets: nothing between these two knows where tokens are. The whole UNet does (convolutions), so it has no recipe.
LEVEL = Recipe(("proj_in",), out="proj_out", embed_grid=True)
LEVELS = {"Transformer2DModel": LEVEL, "TransformerSpatioTemporalModel": LEVEL}
NO_PLACE = "this model has no place to permute them once"
PLACED = {
    "WanAnimateTransformer3DModel": "poses are added to, and faces looked at by, the tokens of one frame at a time",
    "FluxControlNetModel": "a ControlNet gives away the tokens of every block",
}


def parts_of(model: nn.Module, name: str) -> list[Any]:
    """What a name of a recipe stands for: one part, every part of a dict of them, or none where the model was made without.

    Raises ``AttributeError`` where the model has no such attribute.
    """
    part = getattr(model, name)
    if part is None:
        return []
    return list(part.values()) if isinstance(part, nn.ModuleDict) else [part]


def recipe_of(model: nn.Module, recipes: dict[str, Recipe]) -> Recipe | None:
    """The recipe of exactly this class, if its parts are where we think."""
    recipe = recipes.get(type(model).__name__)
    if recipe is None:
        return None
    names = (*recipe.embed, recipe.out, *recipe.rope, *recipe.modulation)
    if not all(hasattr(model, name) for name in names) or getattr(model, recipe.out) is None:
        return None
    return recipe
