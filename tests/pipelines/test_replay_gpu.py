"""Recorded training steps on a GPU."""

import dataclasses

import pytest
import torch

from foveal.pipelines.emoji.models import MODELS, build_transformer
from foveal.pipelines.emoji.text import TextTable
from foveal.pipelines.emoji.training import RECIPES, EmojiTrainer, start_from_nothing

pytestmark = pytest.mark.gpu


def losses(recorded: bool, steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    model, text = build_transformer(MODELS["tiny"].transformer, "twin"), TextTable()
    start_from_nothing(model)
    recipe = dataclasses.replace(RECIPES["tiny"], warmup=2)
    trainer = EmojiTrainer(model, text, recipe, torch.device("cuda"), recorded=recorded)
    return [trainer.train_step(step / steps).item() for step in range(steps)]


def test_recorded_steps_equal_ordinary_ones():
    torch.backends.cuda.enable_cudnn_sdp(False)
    ordinary, recorded = losses(False), losses(True)
    assert ordinary[-1] < ordinary[0] and recorded == pytest.approx(ordinary, rel=2e-2)
