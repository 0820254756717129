"""The emoji model as data: architecture, frame sizes, sampler.

Notable choices
- Constructor arguments of diffusers' stock `FluxTransformer2DModel`: patches of 4 x 4 pixels instead of packed latents,
  no VAE.
- `build_transformer` returns the stock class where diffusers is installed and the plain-torch twin elsewhere; parameter
  names and outputs agree, so weights move freely between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from foveal.pipelines.world.models import wants_stock

TOY = "toy model that knows 64 small pictures by heart; its numbers do not transfer to large models"
PATCH = 4  # edge of a token in pixels
SHIFTS: dict[int, float] = {64: 3.0, 128: 4.0, 256: 6.0}  # of the noise levels, by trained frame size in pixels


@dataclass(frozen=True, slots=True)
class EmojiSpec:
    """`transformer` holds the constructor arguments; shifts: noise schedule of each trained frame size (pixels)."""

    id: str
    transformer: dict[str, Any]
    size: int = 128
    steps: int = 8
    guidance: float = 1.0
    shifts: dict[int, float] = field(default_factory=lambda: dict(SHIFTS))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (1, H, W)."""
        return 1, self.size // PATCH, self.size // PATCH

    def shift(self, size: int) -> float:
        """The shift of the trained frame size nearest to `size`."""
        from foveal.pipelines.emoji.vocabulary import CANVASES, canvas_of

        return self.shifts[CANVASES[canvas_of(size)]]


def architecture(heads: int, double: int, single: int) -> dict[str, Any]:
    """Arguments of `FluxTransformer2DModel` for a pixel-space model with heads of width 64."""
    return {
        "in_channels": 3 * PATCH * PATCH,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 28, 28),
        "guidance_embeds": False,
    }


MODELS: dict[str, EmojiSpec] = {
    "emoji-flux": EmojiSpec("emoji-flux", architecture(heads=3, double=2, single=6), guidance=2.0),
    "tiny": EmojiSpec("tiny", architecture(heads=1, double=1, single=1), size=64),
}


def build_transformer(config: dict[str, Any], kind: str = "auto") -> Any:
    """A fresh transformer. kind: "stock" (diffusers), "twin" (plain torch) or "auto" (stock if installed)."""
    if wants_stock(kind):
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return FluxTransformer2DModel(**config)
    from foveal.pipelines.emoji.twin import FluxTwin

    return FluxTwin(**config)
