"""An untrained model of the emoji world in a folder."""

import torch

from foveal.pipelines.emoji.export import export
from foveal.pipelines.emoji.models import MODELS, build_transformer
from foveal.pipelines.emoji.text import TextTable

PROMPTS = ["a large fox on a mint plain background", "a small owl left of a large rose on a navy checker background"]


def make_model(folder):
    """A random transformer whose output is not zero, 16 x 16 tokens."""
    torch.manual_seed(0)
    network = build_transformer(MODELS["tiny"].transformer, "twin")
    weights = {f"model.{k}": v + 0.02 * torch.randn_like(v) for k, v in network.state_dict().items()}
    weights |= {f"text.{k}": v for k, v in TextTable(64).state_dict().items()}
    export(folder / "tiny", MODELS["tiny"], weights)
    return folder / "tiny"
