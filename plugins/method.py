"""A method: knobs, and the plan they make. Most methods write ``plan`` only.

Methods are frozen dataclasses, registered through the entry-point group ``foveal.methods``, ours and other people's alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

from torch import Tensor, nn

from foveal.kernels.block_sparse import BlockPlan, block_sparse_attention
from foveal.plugins.order import Order
from foveal.plugins.site import Grid, MethodError, Site, State

GROUP = "foveal.methods"


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods; these knobs are common to all.

    density        budget: attended pairs / all pairs; a static method takes its nearest setting not above it
    dense_steps    first steps that run dense: a number, or a fraction of the steps (a float below 1)
    dense_layers   layers that run dense, counted over the selected layers; negative counts from the end
    min_tokens     sequences shorter than this run dense
    refresh_every  make a new plan every so many steps (for methods that look at q and k)
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ("self", "joint")

    density: float | None = None
    dense_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 0
    refresh_every: int = 1

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise MethodError(f"density is {self.density}; it is a share of all pairs, so give a number in (0, 1].")
        if self.dense_steps < 0:
            raise MethodError(f"dense_steps is {self.dense_steps}; give a number of steps, or a fraction below 1.")
        if self.min_tokens < 0 or self.refresh_every < 1:
            raise MethodError(f"min_tokens {self.min_tokens} must be >= 0 and refresh_every {self.refresh_every} >= 1.")
        object.__setattr__(self, "dense_layers", tuple(int(i) for i in self.dense_layers))

    def apply_preset(self, presets: Mapping[str, Mapping[str, Any]]) -> None:
        """For ``__post_init__`` of methods with a ``preset`` knob: set what the preset names and the caller left at its default."""
        chosen = getattr(self, "preset", None)
        if chosen is None:
            return
        if chosen not in presets:
            raise MethodError(f"preset is {chosen!r}{suggest(chosen, presets)}; it is one of {', '.join(presets)}.")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for knob, value in presets[chosen].items():
            if getattr(self, knob) == defaults[knob]:
                object.__setattr__(self, knob, value)

    # ---- what a method may write
    def order(self, grid: Grid) -> Order | None:
        """A static token order of the grid; the host then permutes tokens and RoPE once per model call."""
        return None

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, state: State) -> BlockPlan | None:
        """q, k, v [B, H, N, D] views, after norm and RoPE. None means dense, which the host counts and names."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site, state: State) -> Tensor | None:
        """Default: plan, then the kernel. -> [B, H, N, D] with q's strides, or None for dense."""
        plan = self.plan(q, k, v, site, state)
        return None if plan is None else block_sparse_attention(q, k, v, plan, scale=site.scale)

    def parameters(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Learned parts, if any; kept and saved by the handle."""
        return {}

    # ---- when it stands aside
    def stands_aside(self, site: Site) -> str | None:
        """Why this call runs dense by the common knobs, or None."""
        if self.first_sparse_step(site.steps) > site.step:
            return "dense step"
        if site.layer in {i % site.layers for i in self.dense_layers}:
            return "dense layer"
        if site.tokens < self.min_tokens:
            return "fewer tokens than min_tokens"
        return None

    def first_sparse_step(self, steps: int | None) -> int:
        if isinstance(self.dense_steps, float) and self.dense_steps < 1:
            return 0 if self.dense_steps == 0 or steps is None else math.ceil(self.dense_steps * steps)
        return int(self.dense_steps)

    # ---- settings
    def knobs(self) -> dict[str, Any]:
        """Every knob with its value: plain data that ``make(name, **knobs)`` and JSON take back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @property
    def label(self) -> str:
        """Name and the knobs that differ from their defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return " ".join([self.name, *changed])


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, (tuple, list)) else value


def methods() -> dict[str, type[Method]]:
    """Every registered method by name: the built-in ones and those of installed packages."""
    return {point.name: point.load() for point in entry_points(group=GROUP)}


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises ``MethodError`` that suggests the nearest name."""
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise MethodError(
            f"there is no method called {name!r}{suggest(name, points)}; foveal methods lists them: {', '.join(sorted(points))}."
        )
    return points[name].load()


def make(name: str, **knobs: Any) -> Method:
    """A method from its name and knobs; lists become tuples. Raises ``MethodError`` for an unknown name or knob."""
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    for knob in knobs:
        if knob not in known:
            raise MethodError(f"{name} has no knob {knob!r}{suggest(knob, known)}; its knobs are {', '.join(known)}.")
    return cls(**{k: _tuples(v) for k, v in knobs.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, (list, tuple)) else value


def suggest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
