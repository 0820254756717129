"""An untrained LINA of four shapes in a folder, in the format of the shipped one."""

import torch

from foveal.pipelines.lina.data import SHAPES
from foveal.pipelines.lina.export import export
from foveal.pipelines.lina.judge import Judge
from foveal.pipelines.lina.models import MODELS
from foveal.vision.lina import LinaModel


def make_lina(folder):
    """Random weights whose output is not zero, 4 x 4 tokens, with a judge as random."""
    torch.manual_seed(0)
    model = LinaModel(MODELS["tiny"].config)
    weights = {name: p + 0.05 * torch.randn_like(p) for name, p in model.state_dict().items()}
    export(folder / "tiny", MODELS["tiny"], SHAPES, weights, Judge(len(SHAPES)).state_dict())
    return folder / "tiny"
