"""The shipped LINA and its smaller siblings, as data: architecture, sampler, recipe.

Notable choices
- Latents are pixels: no VAE.
- Widths are chosen for 4 MB of fp16 weights; the largest model here has a seven-hundredth of the paper's parameters.
- Masks leave fewer tokens hidden than in the paper's recipe (which hides 70 % and more): an image has 64 tokens, and the last
  steps of generation see nearly all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveal.vision.lina_config import PRESETS, LinaConfig

TOY = "toy model of ten kinds of clothing in 28 x 28 grey pixels; its numbers do not transfer to large models"


@dataclass(frozen=True)
class LinaSpec:
    """A model that can be trained here.

    data       "fashion", "digits" or "tiny"; size: pixels of a picture that comes out
    steps, flow_steps, guidance, min_guidance    of the sampler, unless a call says otherwise
    """

    id: str
    config: LinaConfig
    data: str
    size: int
    note: str = TOY
    steps: int = 16
    flow_steps: int = 25
    guidance: float = 1.5
    min_guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained; every field is a number the card repeats."""

    batch: int
    lr: float = 2e-3  # peak learning rate
    warmup: int = 200  # steps
    decay: float = 0.5  # last part of the run in which the learning rate falls
    dropout: float = 0.1  # share of pictures without a class, for guidance
    mask_low: float = 0.25  # share of hidden tokens: normal around 1 with this deviation, between low and 1
    mask_std: float = 0.4
    draws: int = 4  # noise levels of a token in a step
    ema: float = 0.999  # ramps up as (1 + step) / (10 + step)
    weight_decay: float = 0.02  # not on vectors, tables and gates
    clip: float = 1.0  # gradient norm
    seed: int = 1
    judge_steps: int = 1_500


MODELS: dict[str, LinaSpec] = {
    "lina-fashion": LinaSpec("lina-fashion", PRESETS["lina_fashion"], "fashion", 28),
    "nano-fashion": LinaSpec(
        "nano-fashion", PRESETS["lina_nano_digits"], "fashion", 8, "toy model of clothing in 8 x 8 grey pixels", steps=8
    ),
    "digits": LinaSpec("lina-digits", PRESETS["lina_nano_digits"], "digits", 8, "toy model of digits in 8 x 8 grey pixels", steps=8),
    "tiny": LinaSpec("tiny", PRESETS["lina_tiny"], "tiny", 8, "toy model of four shapes in 8 x 8 grey pixels", steps=4, flow_steps=8),
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "lina-fashion": Recipe(batch=1024),
    "nano-fashion": Recipe(batch=64, lr=1e-3, warmup=50, ema=0.99, judge_steps=400),
    "digits": Recipe(batch=64, lr=1e-3, warmup=50, ema=0.99, judge_steps=400),
    "tiny": Recipe(batch=32, lr=4e-3, warmup=5, ema=0.9, judge_steps=60),
}
