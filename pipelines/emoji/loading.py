"""The emoji model from its folder: what `foveal.pipelines.shipped` needs to know about models of this kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveal.pipelines.emoji.models import PATCH
from foveal.pipelines.errors import UserError

if TYPE_CHECKING:
    from foveal.pipelines.emoji.pipeline import EmojiPipeline

KIND = "emoji"


def is_emoji(config: dict[str, Any]) -> bool:
    """Whether a config.json belongs to this kind of model."""
    return config.get("kind") == KIND


def card_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Card` that differ from those of a video model."""
    net, edge = config["transformer"], config["size"] // PATCH
    shifts = {int(size): float(shift) for size, shift in config["shifts"].items()}
    return {
        "kind": KIND,
        "frames": 1,
        "grid": (1, edge, edge),
        "tokens": edge * edge,
        "shift": shifts[config["size"]],
        "layers": net["num_layers"] + net["num_single_layers"],
        "objects": 2,
        "shifts": tuple(shifts.items()),
        "note": config["note"],
    }


def build(config: dict[str, Any], size: int) -> EmojiPipeline:
    """The pipeline with untrained weights. Raises UserError for another vocabulary than this version's."""
    from foveal.pipelines.emoji.pipeline import EmojiPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from foveal.pipelines.emoji.text import TextTable
    from foveal.pipelines.emoji.vocabulary import VOCAB

    if tuple(config["words"]) != VOCAB:
        raise UserError(
            f"the config of {config['id']} lists other words than this version of foveal: use matching versions."
        )
    net = {**config["transformer"], "axes_dims_rope": tuple(config["transformer"]["axes_dims_rope"])}
    return EmojiPipeline(
        FluxTransformer2DModel(**net),
        TextTable(net["joint_attention_dim"]),
        FlowMatchEulerDiscreteScheduler(shift=config["shifts"][str(config["size"])]),
        size,
        config["steps"],
        config["guidance"],
        config["shifts"],
    )
