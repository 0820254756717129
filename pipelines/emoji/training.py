"""Flow-matching training on scenes drawn inside the step, at several frame sizes.

Notable choices
- The loop, the optimizer, the average and the stages are those of the world's models (`foveal.pipelines.world.training`);
  only the data and the loss are different.
- Small batches, for many steps: names and outlines need steps more than samples.
- Small frames first: at 64 pixels a sample costs a tenth, and names, colours and outlines are learnt there.

B samples, S height = width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.emoji.flow import to_latents, velocity
from foveal.pipelines.emoji.models import SHIFTS
from foveal.pipelines.emoji.render import render
from foveal.pipelines.emoji.scenes import PAIRS, draw_attributes, draw_positions
from foveal.pipelines.emoji.vocabulary import word_ids
from foveal.pipelines.world.flow import draw_sigmas
from foveal.pipelines.world.training import Recipe, Shape, Stage, Trainer


def stage(until: float, batches: dict[int, int], shares: dict[int, float]) -> Stage:
    """A part of the run: share of its steps by frame size."""
    shapes = tuple(Shape(size, batches[size], SHIFTS[size], share) for size, share in shares.items())
    return Stage(until, PAIRS, shapes)


BATCHES = {64: 192, 128: 64, 256: 16}
FEW = {64: 8, 128: 4, 256: 2}

RECIPES: dict[str, Recipe] = {
    "emoji-flux": Recipe(
        frames=1,
        size=128,
        batch=BATCHES[128],
        shift=SHIFTS[128],
        decay=0.5,
        stages=(
            stage(0.3, BATCHES, {64: 1.0}),
            stage(0.65, BATCHES, {64: 0.15, 128: 0.75, 256: 0.1}),
            stage(1.0, BATCHES, {64: 0.05, 128: 0.5, 256: 0.45}),
        ),
    ),
    "tiny": Recipe(
        frames=1,
        size=64,
        batch=FEW[64],
        lr=2e-3,
        warmup=5,
        ema=0.9,
        shift=SHIFTS[64],
        stages=(stage(0.4, FEW, {64: 1.0}), stage(1.0, FEW, {64: 0.5, 128: 0.3, 256: 0.2})),
    ),
}


class EmojiTrainer(Trainer):
    """`Trainer` on scenes of emoji. seen: samples so far, by frame size."""

    def __init__(
        self, model: nn.Module, text: nn.Module, recipe: Recipe, device: torch.device, recorded: bool = False
    ) -> None:
        super().__init__(model, text, recipe, device, recorded)
        self.seen: dict[int, int] = {shape.size: 0 for part in recipe.stages for shape in part.shapes}

    def warm_up(self, shape: Shape) -> None:
        """One forward and backward of a shape, without a step: what is compiled is compiled, what fails fails early."""
        self.objective(*self.draw(shape, PAIRS)).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.seen[shape.size] -= shape.batch

    def shapes(self) -> list[Shape]:
        """One shape of each frame size, smallest first."""
        found = {shape.size: shape for part in self.recipe.stages for shape in part.shapes}
        return [found[size] for size in sorted(found)]

    def draw(self, shape: Shape, pairs: float) -> tuple[Tensor, ...]:
        recipe, rng, device = self.recipe, self.generator, self.device
        rng.manual_seed(recipe.seed * 1_000_003 + self.step)
        attributes = draw_attributes(shape.batch, rng, pairs=pairs)
        x0 = to_latents(render(attributes, draw_positions(attributes, rng), shape.size))
        kept = torch.rand(shape.batch, 1, generator=rng, device=device) >= recipe.dropout
        sigma = draw_sigmas(shape.batch, shape.shift, recipe.high, rng)
        self.seen[shape.size] += shape.batch
        ids = word_ids(attributes, shape.size) * kept
        return x0, ids, sigma, torch.randn(x0.shape, generator=rng, device=device)

    def objective(self, x0: Tensor, ids: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            v = velocity(self.model, (1 - level) * x0 + level * noise, sigma, self.text(ids))
        return (v.float() - (noise - x0)).pow(2).mean()


def start_from_nothing(model: Any) -> None:
    """Zero the output layer and the modulations, so that every block begins as the identity."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    names = ("norm", "norm1", "norm1_context")
    layers = [getattr(block, name).linear for block in blocks for name in names if hasattr(block, name)]
    for layer in (*layers, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
