"""The shipped models as data: architecture, clip, sampler.

Notable choices
- Architectures are keyword arguments of diffusers' stock `WanTransformer3DModel`: patches of pixels instead of
  latents, no VAE. Head width 64 everywhere; token grids divide by 4 and 8.
- `build_transformer` returns the stock class where diffusers is installed and the plain-torch twin elsewhere;
  parameter names and outputs agree, so weights move freely between the two.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

TOY = "toy model trained on a synthetic world; its numbers do not transfer to large models"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model: `transformer` holds the constructor arguments, the rest is the clip and the recommended sampler.

    world: the version of the pictures it learnt (`render`); objects: how many it knows; shifts: (size, shift) of every
    size it was trained at, empty for `size` and `shift` alone; gates: what an export must reach, as (group, metric,
    least) with a group of `examination.GROUPS`, judged at `size`.
    """

    id: str
    transformer: dict[str, Any]
    frames: int
    size: int
    steps: int = 8
    guidance: float = 1.0
    shift: float = 6.0
    world: int = 1
    objects: int = 1
    shifts: tuple[tuple[int, float], ...] = ()
    gates: tuple[tuple[str, str, float], ...] = (("one", "acc_all", 0.97),)

    @property
    def sizes(self) -> dict[int, float]:
        """Trained sizes and their shifts."""
        return dict(self.shifts) or {self.size: self.shift}

    def latents(self, size: int) -> tuple[int, int, int, int]:
        """Shape [3, T, S, S] of one clip of that size."""
        return self.transformer["in_channels"], self.frames, size, size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (T, H, W)."""
        return token_grid(self.transformer["patch_size"], self.frames, self.size)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


def token_grid(patch: tuple[int, int, int], frames: int, size: int) -> tuple[int, int, int]:
    """Token grid (T, H, W) of a clip cut into `patch`-sized pieces."""
    return frames // patch[0], size // patch[1], size // patch[2]


def architecture(heads: int, layers: int, ffn: int) -> dict[str, Any]:
    """Arguments of `WanTransformer3DModel` for a pixel-space model with heads of width 64."""
    return {
        "patch_size": (1, 4, 4),
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 64,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "rope_max_seq_len": 128,
    }


MODELS: dict[str, ModelSpec] = {
    "world-nano": ModelSpec("world-nano", architecture(heads=2, layers=6, ffn=384), frames=8, size=32),
    "world-video": ModelSpec(
        "world-video",
        architecture(heads=3, layers=8, ffn=512),
        frames=16,
        size=64,
        shift=8.0,
        world=2,
        objects=2,
        shifts=((32, 6.0), (64, 8.0)),
        gates=(
            ("one", "acc_all", 0.98),
            ("one", "world_psnr", 36.0),
            ("two", "acc_all", 0.80),
            ("one, held out", "acc_all", 0.95),
        ),
    ),
    "tiny": ModelSpec("tiny", architecture(heads=1, layers=2, ffn=64), frames=4, size=16),
    "tiny-two": ModelSpec(
        "tiny-two",
        architecture(heads=1, layers=2, ffn=64),
        frames=4,
        size=24,
        shift=8.0,
        world=2,
        objects=2,
        shifts=((16, 6.0), (24, 8.0)),
    ),
}


def build_transformer(config: dict[str, Any], kind: str = "auto") -> Any:
    """A fresh transformer. kind: "stock" (diffusers), "twin" (plain torch) or "auto" (stock if installed)."""
    if wants_stock(kind):
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(**config)
    from foveal.pipelines.world.twin import WanTwin

    return WanTwin(**config)


def wants_stock(kind: str) -> bool:
    """Whether "stock", "twin" or "auto" means diffusers' own class here."""
    if kind not in ("auto", "stock", "twin"):
        raise ValueError(f"transformer kind {kind!r} is unknown: use 'auto', 'stock' or 'twin'.")
    return kind == "stock" or (kind == "auto" and importlib.util.find_spec("diffusers") is not None)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
