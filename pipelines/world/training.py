"""Flow-matching training on clips rendered inside the step.

Notable choices
- All random numbers of a step come from (seed, step): a resumed run repeats an uninterrupted one.
- AdamW (.9, .98) on fp32 weights, bf16 autocast on GPUs, unweighted velocity loss, an exponential average of the
  weights.
- The caller says how far the run is (`progress` in [0, 1]), by step or by wall time; the learning rate warms up by
  step, stays, and falls linearly to 2 % over the last part.
- A recipe may mix clips of several sizes and change the mixture as the run goes on (`Stage`); every step has one size,
  drawn from (seed, step), so a compiled network sees few shapes.

B clips, T frames, S height = width
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.world.flow import draw_sigmas, to_latents, velocity
from foveal.pipelines.world.prompts import draw_attributes
from foveal.pipelines.world.render import render
from foveal.pipelines.world.replay import Replay
from foveal.pipelines.world.vocabulary import word_ids

FLOOR = 0.02  # last learning rate, relative to the peak
SMOOTHING = 0.98  # of the logged loss


@dataclass(frozen=True, slots=True)
class Shape:
    """Steps with clips of one size; `share` of the steps, relative to the other shapes."""

    size: int
    batch: int
    shift: float
    share: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run, up to `until` of its progress: its shapes, and the share of clips with two objects."""

    until: float
    pairs: float
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one stage is trained; every field is a number the card repeats."""

    frames: int
    size: int
    batch: int
    lr: float = 1e-3  # peak learning rate
    warmup: int = 200  # steps
    decay: float = 0.4  # last part of the run in which the learning rate falls
    shift: float = 6.0  # of the noise levels; higher trains more at high noise
    high: float = 0.25  # share of clips with sigma ~ U(.9, 1)
    dropout: float = 0.1  # share of clips without a prompt, for guidance
    ema: float = 0.999  # ramps up as (1 + step) / (10 + step)
    weight_decay: float = 0.01  # not on vectors and tables
    clip: float = 1.0  # gradient norm
    seed: int = 1
    world: int = 1  # version of the pictures
    stages: tuple[Stage, ...] = ()  # none: every step has `size`, `batch`, `shift` and one object

    def at(self, progress: float, step: int) -> tuple[Shape, float]:
        """The shape of a step and the share of its clips with two objects."""
        if not self.stages:
            return Shape(self.size, self.batch, self.shift, 1.0), 0.0
        stage = next((stage for stage in self.stages if progress < stage.until), self.stages[-1])
        shares = [shape.share for shape in stage.shapes]
        draw = random.Random(self.seed * 1_000_003 + step)
        return draw.choices(stage.shapes, shares)[0], stage.pairs


def mixed(small: tuple[int, int, float], large: tuple[int, int, float]) -> tuple[Stage, ...]:
    """Mostly small clips first, then mostly large ones, half of all clips with two objects.

    small, large: (size, batch, shift)
    """
    first = Stage(0.45, 0.5, (Shape(*small, 0.85), Shape(*large, 0.15)))
    return first, Stage(1.0, 0.5, (Shape(*small, 0.3), Shape(*large, 0.7)))


RECIPES: dict[str, Recipe] = {
    "world-nano": Recipe(frames=8, size=32, batch=256),
    "world-video": Recipe(
        frames=16,
        size=64,
        batch=64,
        lr=8e-4,
        decay=0.55,
        shift=8.0,
        world=2,
        stages=mixed((32, 128, 6.0), (64, 64, 8.0)),
    ),
    "tiny": Recipe(frames=4, size=16, batch=8, lr=2e-3, warmup=5, ema=0.9),
    "tiny-two": Recipe(
        frames=4,
        size=24,
        batch=4,
        lr=2e-3,
        warmup=5,
        ema=0.9,
        shift=8.0,
        world=2,
        stages=mixed((16, 8, 6.0), (24, 4, 8.0)),
    ),
}


class Trainer:
    """A model, its text table and everything that changes while they are trained.

    Attributes: step (steps done), clips (clips seen), loss (smoothed, 0-d tensor or None), losses (the same of each
    size), named (parameters by name, "model." or "text."), ema (their average, same order), optimizer.
    recorded: replay steps as CUDA graphs (`replay.py`); on a GPU only.
    """

    def __init__(
        self, model: nn.Module, text: nn.Module, recipe: Recipe, device: torch.device, recorded: bool = False
    ) -> None:
        self.recorded, self._replays = recorded, dict[tuple[int, int], Replay]()
        self.model, self.text, self.recipe, self.device = model.to(device), text.to(device), recipe, device
        self.named = {f"model.{name}": p for name, p in model.named_parameters()}
        self.named |= {f"text.{name}": p for name, p in text.named_parameters()}
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}
        self.optimizer = self._optimizer()
        self.generator = torch.Generator(device=device)
        self.step = self.clips = 0
        self.loss: Tensor | None = None
        self.losses: dict[int, Tensor] = {}

    @property
    def bf16(self) -> bool:
        return self.device.type == "cuda"

    def train_step(self, progress: float) -> Tensor:
        """One step.  -> its loss, 0-d, not synchronised"""
        for group in self.optimizer.param_groups:
            self._set_rate(group, learning_rate(self.recipe, self.step, progress))
        shape, pairs = self.recipe.at(progress, self.step)
        batch = self.draw(shape, pairs)
        if self.recorded and self.step:
            key = shape.size, shape.batch
            if key not in self._replays:
                self._replays[key] = Replay(self.objective, self._advance, batch, list(self.named.values()))
            loss = self._replays[key](batch).clone()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.objective(*batch)
            self._advance(loss)
            loss = loss.detach()
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.named.values()], 1 - keep)
        self.loss = _smoothed(self.loss, loss)
        self.losses[shape.size] = _smoothed(self.losses.get(shape.size), loss)
        self.step += 1
        self.clips += shape.batch
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model and the text table hold the averaged weights."""
        kept = {name: p.detach().clone() for name, p in self.named.items()}
        self.put(self.ema)
        try:
            yield
        finally:
            self.put(kept)

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Copy weights in, by name; every name must be there."""
        for name, p in self.named.items():
            p.copy_(weights[name])

    def draw(self, shape: Shape, pairs: float) -> tuple[Tensor, ...]:
        """The data of this step: clean latents, word ids, noise levels, noise."""
        recipe, rng, device, batch = self.recipe, self.generator, self.device, shape.batch
        rng.manual_seed(recipe.seed * 1_000_003 + self.step)
        attributes = draw_attributes(batch, rng, pairs=pairs)
        x0 = to_latents(render(attributes, recipe.frames, shape.size, rng, recipe.world))
        ids = word_ids(attributes) * (torch.rand(batch, 1, generator=rng, device=device) >= recipe.dropout)
        sigma = draw_sigmas(batch, shape.shift, recipe.high, rng)
        return x0, ids, sigma, torch.randn(x0.shape, generator=rng, device=device)

    def objective(self, x0: Tensor, ids: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """The loss of a drawn batch."""
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            v = velocity(self.model, (1 - level) * x0 + level * noise, sigma * 1000, self.text(ids))
        return (v.float() - (noise - x0)).pow(2).mean()

    def _advance(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.named.values()), self.recipe.clip)
        self.optimizer.step()

    def _set_rate(self, group: dict[str, Any], rate: float) -> None:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def _optimizer(self) -> torch.optim.AdamW:
        free = [n for n, p in self.named.items() if p.ndim < 2 or "table" in n or n.startswith("text.")]
        groups = [
            {"params": [p for n, p in self.named.items() if n not in free], "weight_decay": self.recipe.weight_decay},
            {"params": [self.named[n] for n in free], "weight_decay": 0.0},
        ]
        rate: Any = torch.tensor(self.recipe.lr, device=self.device) if self.recorded else self.recipe.lr
        on_gpu = self.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=on_gpu, capturable=self.recorded)


def _smoothed(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Peak rate x linear warm-up by step x linear decay by progress."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    late = max(0.0, progress - (1 - recipe.decay)) / recipe.decay if recipe.decay > 0 else 0.0
    return recipe.lr * warm * max(FLOOR, 1 - (1 - FLOOR) * late)


def start_from_nothing(model: Any) -> None:
    """Zero the output layer, so that the first prediction is zero velocity."""
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
