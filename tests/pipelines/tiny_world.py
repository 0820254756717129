"""An untrained model of the world in a folder, and configs that run on it in a second."""

import torch

from foveal.pipelines.world.export import export
from foveal.pipelines.world.models import MODELS, build_transformer
from foveal.pipelines.world.text import TextTable

PROMPTS = [
    "a large orange ring moving down-right on a navy striped background",
    "a small red cross standing still on a gray plain background",
]
GRAT = {"name": "grat", "label": "GRAT", "knobs": {"group": [1, 4, 4], "b": 1}}


def random_weights(build, table):
    """Weights of a network whose output is not zero, and of its text table."""
    torch.manual_seed(0)
    weights = {f"model.{k}": v + 0.02 * torch.randn_like(v) for k, v in build().state_dict().items()}
    return weights | {f"text.{k}": v for k, v in table(64).state_dict().items()}


def make_model(folder):
    """A random transformer, 4 x 4 x 4 tokens."""
    spec = MODELS["tiny"]
    export(folder / "tiny", spec, random_weights(lambda: build_transformer(spec.transformer, "twin"), TextTable))
    return folder / "tiny"


def config(folder, output, /, **changes):
    """A config as plain data."""
    base = {
        "model": str(folder), "output": str(output), "prompts": PROMPTS, "seeds": [0, 1], "sampler": {"steps": 2, "guidance": 1.0},
        "methods": [GRAT], "metrics": ["psnr", "ssim", "step_rel_l1", "world_psnr", "acc_all"], "rounds": 1,
        "operator_rounds": 2, "step_samples": 1, "noise_floor_samples": 1, "device": "cpu",
    }  # fmt: skip
    return {**base, **changes}
