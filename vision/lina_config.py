"""LINA as data: what a model is made of, and the sizes of the paper.

Letters: M query tokens, n image tokens, D width. Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens".

Notable choices
- M = n / 4: the grid of queries has half the side of the grid of image tokens.
- New models keep the key gate positive (``kv_gate="exp"``); the paper's presets hold it as the released files do (``"raw"``).
- ``video`` keeps two parts that released files hold and that images use as constants or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from foveal.kernels.gated_linear.plain import NORMALISATIONS

GATES = ("exp", "raw", "data")


@dataclass(frozen=True, kw_only=True)
class LinaConfig:
    """One model. Raises ValueError in one sentence for sizes that do not fit.

    side, channels     of the image or latent, in pixels of it
    patch              pixels of a token's side
    dim, heads         width of every part
    connector_depth, encoder_depth, decoder_depth, head_depth    blocks
    num_classes        classes, or None for a model conditioned on text
    text_dim, text_tokens, text_table   width of the text states, tokens of a prompt, rows of the table that fills missing ones
    normalisation      "division" or "subtraction"
    kv_gate            of the decoder: "exp" (a key gate that stays positive), "raw" (released), "data" (from the input,
                       for any number of tokens), or None
    per_head           a gate of its own for every head
    conv               depth-wise 5 x 5 convolution beside the decoder's attention
    video              hold the parts that only videos use
    """

    side: int
    channels: int
    patch: int = 1
    dim: int
    heads: int
    connector_depth: int
    encoder_depth: int
    decoder_depth: int
    head_depth: int
    num_classes: int | None = 1000
    text_dim: int | None = None
    text_tokens: int = 256
    text_table: int = 512
    normalisation: str = "division"
    kv_gate: str | None = "exp"
    per_head: bool = True
    conv: bool = True
    video: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"dim is {self.dim} and heads {self.heads}; dim must be divisible by heads and, for the positions, by 4."
            )
        if self.side % (2 * self.patch):
            raise ValueError(
                f"side is {self.side} and patch {self.patch}; side must be a multiple of {2 * self.patch}."
            )
        if (self.num_classes is None) == (self.text_dim is None):
            raise ValueError("give either num_classes or text_dim: one of them is the condition.")
        if self.text_dim is not None and self.text_table < self.text_tokens:
            raise ValueError(f"text_table is {self.text_table}; at least text_tokens ({self.text_tokens}) are needed.")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(
                f"there is no normalisation {self.normalisation!r}; choose one of {', '.join(NORMALISATIONS)}."
            )
        if self.kv_gate is not None and self.kv_gate not in GATES:
            raise ValueError(f"there is no kv_gate {self.kv_gate!r}; choose one of {', '.join(GATES)}, or None.")

    @property
    def grid(self) -> int:
        """Tokens of a side."""
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        """n, image tokens."""
        return self.grid**2

    @property
    def queries(self) -> int:
        """M, query tokens."""
        return (self.grid // 2) ** 2

    @property
    def token_width(self) -> int:
        """Numbers of a token of the latent."""
        return self.patch**2 * self.channels

    def resized(self, grid: int) -> LinaConfig:
        """The same model for ``grid`` x ``grid`` tokens."""
        return replace(self, side=grid * self.patch)


def _paper(dim: int, heads: int, side: int = 16, channels: int = 16, patch: int = 1, **condition: Any) -> LinaConfig:
    return LinaConfig(
        side=side, channels=channels, patch=patch, dim=dim, heads=heads, connector_depth=16, encoder_depth=16,
        decoder_depth=16, head_depth=6, kv_gate="raw", video=True, **condition,
    )  # fmt: skip


def _text(side: int) -> LinaConfig:
    """Latents of four channels at an eighth of the image's side, patches of 2; states of Phi-2."""
    return _paper(1536, 16, side, channels=4, patch=2, num_classes=None, text_dim=2560)


PRESETS: dict[str, LinaConfig] = {
    "lina_tiny": LinaConfig(
        side=8, channels=1, patch=2, dim=32, heads=2, connector_depth=1, encoder_depth=1, decoder_depth=1, head_depth=1,
        num_classes=4,
    ),
    "lina_nano_digits": LinaConfig(
        side=8, channels=1, patch=2, dim=96, heads=4, connector_depth=2, encoder_depth=2, decoder_depth=2, head_depth=2,
        num_classes=10,
    ),
    "lina_fashion": LinaConfig(
        side=32, channels=1, patch=4, dim=128, heads=4, connector_depth=1, encoder_depth=3, decoder_depth=4, head_depth=3,
        num_classes=10,
    ),
    "lina_small_256": _paper(768, 12),
    "lina_d48w1024": _paper(1024, 16),
    "lina_d48w1536": _paper(1536, 16),
    "lina_t2i_256": _text(32),
    "lina_t2i_512": _text(64),
    "lina_t2i_1024": _text(128),
}  # fmt: skip


def preset(name: str) -> LinaConfig:
    """A size by name. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"there is no LINA called {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
