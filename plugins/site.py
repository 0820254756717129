"""Where an attention call happens, and what a method may keep between calls.

A site is one attention call: one layer, at one step, in one guidance branch. The host fills it in; methods only read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # (T, H, W) latent tokens; images have T = 1


class MethodError(ValueError):
    """A method, knob or call that cannot be right, in one sentence."""


class Span(NamedTuple):
    """Tokens start..stop-1 of the sequence at the attention call."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Site:
    """Facts of one attention call. Spans are in tokens of the sequence at the call.

    role         "self" (visual tokens only), "joint" (visual and text), "text", "cross", "temporal", ...
    name, layer, layers   qualified module name; index among the selected layers and their number
    step, steps  denoising step from 0 and their number (None: the host cannot know)
    branch       guidance branch: "cond", "uncond", ... or None
    grid         (T, H, W) of the visual tokens; visual is where they lie
    text         where text tokens lie, or None; valid_text is an int32 tensor [B] on the device, how many lead tokens
                 of the text span are real (None: all)
    extra        other spans: reference images, padding
    ordered      the host has already put the visual tokens in ``method.order(grid)``
    scale        softmax scale, None = head_dim ** -0.5
    layer_id     the layer index as a 0-d tensor, for operators inside compiled graphs
    """

    role: str
    name: str
    layer: int
    layers: int
    grid: Grid
    visual: Span
    step: int = 0
    steps: int | None = None
    branch: str | None = None
    text: Span | None = None
    valid_text: Tensor | None = None
    extra: tuple[Span, ...] = ()
    ordered: bool = False
    scale: float | None = None
    layer_id: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Length of the sequence at the call."""
        return self.visual.size + (self.text.size if self.text else 0) + sum(s.size for s in self.extra)


@dataclass
class State:
    """What a method keeps for one (run, layer, branch). Reset when a run starts; never changed while gradients recompute."""

    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.values[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def reset(self) -> None:
        self.values.clear()

    def bytes(self) -> int:
        """Device and host memory held by tensors in this state."""
        return sum(x.numel() * x.element_size() for x in self.values.values() if isinstance(x, torch.Tensor))
