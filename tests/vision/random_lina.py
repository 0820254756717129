"""A small random LINA, and samples of it."""

import dataclasses

import torch

from foveal.vision.lina import LinaModel
from foveal.vision.lina_config import PRESETS
from foveal.vision.lina_generate import Sampling, generate

TINY = PRESETS["lina_tiny"]


def tiny(seed: int = 0, **changes) -> LinaModel:
    """Random everywhere, modulations and output too."""
    torch.manual_seed(seed)
    model = LinaModel(dataclasses.replace(TINY, **changes)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.2 * torch.randn_like(p) if "scale" not in name else 0.1 * torch.rand_like(p))
    return model.eval()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(model: LinaModel, labels: list[int], seeds: list[int], **settings) -> torch.Tensor:
    sampling = Sampling(**{"num_inference_steps": 4, "num_diffusion_steps": 5, **settings})
    return generate(model, (torch.tensor(labels),), sampling, generators(*seeds))
