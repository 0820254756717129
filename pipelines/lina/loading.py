"""The shipped LINA from its folder: what ``foveal.pipelines.shipped`` needs to know about models of this kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from foveal.pipelines.errors import UserError

if TYPE_CHECKING:
    from foveal.pipelines.lina.pipeline import LinaPipeline


KIND = "lina"
MODEL_FILE, JUDGE_FILE = "model.safetensors", "judge.safetensors"


def is_lina(config: dict[str, Any]) -> bool:
    """Whether a config.json belongs to this kind of model."""
    return config.get("kind") == KIND


def card_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ``Card`` that differ from those of a video model."""
    net = config["network"]
    edge = net["side"] // net["patch"]
    return {
        "kind": KIND,
        "frames": 1,
        "grid": (1, edge, edge),
        "tokens": edge * edge,
        "shift": 1.0,
        "layers": net["connector_depth"] + net["encoder_depth"] + net["decoder_depth"],
        "heads": net["heads"],
        "head_dim": net["dim"] // net["heads"],
        "shifts": ((config["size"], 1.0),),
        "note": config["note"],
        "files": tuple(config["files"]),
    }


def build(config: dict[str, Any], weights: dict[str, dict[str, Tensor]]) -> LinaPipeline:
    """The pipeline with its weights, by file. Raises UserError for weights that do not fit the config."""
    from foveal.pipelines.lina.judge import Judge
    from foveal.pipelines.lina.pipeline import LinaPipeline
    from foveal.vision.lina import LinaModel
    from foveal.vision.lina_checkpoint import load_weights
    from foveal.vision.lina_config import LinaConfig

    try:
        model = LinaModel(LinaConfig(**config["network"]))
        load_weights(model, {name: value.float() for name, value in weights[MODEL_FILE].items()})
        judge = None
        if JUDGE_FILE in weights:
            judge = Judge(len(config["classes"]))
            judge.load_state_dict({name: value.float() for name, value in weights[JUDGE_FILE].items()})
            judge.eval()
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights of {config['id']} do not fit its config.json: {reason}") from error
    own = {key: config[key] for key in ("size", "steps", "flow_steps", "guidance", "min_guidance")}
    return LinaPipeline(model.eval(), config["classes"], **own, judge=judge)
