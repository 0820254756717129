"""Training one model for so many seconds, keeping what it was on the way; and what it gets right afterwards.

Letters: B batch, S pixels a side.

Notable choices
- After a short warm-up the learning rate is constant, and what is judged is a running average of the weights: no schedule bends
  towards an end, so that models can be compared after any number of steps and any number of seconds of one run.
- Averages are kept every ``KEEP_EVERY`` steps. Judging them happens afterwards and costs the run nothing.
- The clock starts after a few steps on a copy: compiling kernels is not training. The device is waited for every ``SYNC_EVERY`` steps.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.pipelines.bench.image_models import compile_blocks
from foveal.pipelines.vision_proof.data import Batches, Pictures, enlarged

SYNC_EVERY, KEEP_EVERY, WARM_STEPS = 10, 20, 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """batch: images of a step; rate: of learning, after ``warm_up`` steps; average: of the weights, per step, at most; decay: of weights;
    compiled: the blocks are."""

    batch: int = 128
    rate: float = 2e-3
    warm_up: int = 100
    average: float = 0.995
    decay: float = 0.05
    smoothing: float = 0.1
    clip: float = 1.0
    compiled: bool = False


class Trainer:
    """A model with its optimiser and its average."""

    def __init__(self, model: nn.Module, batches: Batches, recipe: Recipe) -> None:
        self.model, self.batches, self.recipe, self.steps = model, batches, recipe, 0
        self.device = batches.device
        self.weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        plain = [p for p in self.weights if p.ndim < 2]
        wide = [p for p in self.weights if p.ndim >= 2]
        groups = [{"params": wide, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, fused=self.device.type == "cuda" or None)
        self.average = [p.detach().clone() for p in self.weights]
        if recipe.compiled:
            compile_blocks(model)

    def step(self) -> Tensor:
        """One step, data included. -> its loss, on the device"""
        self.steps += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate * min(1.0, self.steps / self.recipe.warm_up)
        images, labels = self.batches.draw()
        with half(self.device):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        keep = min(self.recipe.average, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - keep)
        return loss.detach()

    def held_bytes(self) -> int:
        """Weights, average, and what the optimiser keeps."""
        kept = [*self.weights, *self.average, *self.model.buffers()]
        kept += [x for state in self.optimiser.state.values() for x in state.values() if torch.is_tensor(x)]
        return sum(x.numel() * x.element_size() for x in kept)


def half(device: torch.device) -> torch.autocast:
    """bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@dataclass
class Course:
    """What a run left. steps, seconds: how long it was; kept: averages of the weights by step, from 0 to the last; log: (step, seconds, loss)."""

    trainer: Trainer
    steps: int = 0
    seconds: float = 0.0
    kept: dict[int, list[Tensor]] = field(default_factory=dict)
    log: list[tuple[int, float, float]] = field(default_factory=list)


def train(trainer: Trainer, seconds: float | None = None, steps: int | None = None) -> Course:
    """Until the seconds or the steps are used up. ValueError where neither or both are given."""
    if (seconds is None) == (steps is None):
        raise ValueError("give seconds or steps; one of them ends the run.")
    warm(trainer)
    course = Course(trainer, kept={0: [x.clone() for x in trainer.average]})
    began = time.perf_counter()
    while True:
        loss = trainer.step()
        if trainer.steps % KEEP_EVERY == 0:
            course.kept[trainer.steps] = [x.clone() for x in trainer.average]
        if trainer.steps % SYNC_EVERY == 0 or trainer.steps == steps:
            wait(trainer.device)
            course.seconds = time.perf_counter() - began
            course.log.append((trainer.steps, course.seconds, loss.item()))
            if trainer.steps == steps or (seconds is not None and course.seconds >= seconds):
                break
    course.steps = trainer.steps
    course.kept[course.steps] = [x.clone() for x in trainer.average]
    return course


def warm(trainer: Trainer) -> None:
    """A few steps on a copy, for kernels to be compiled."""
    batches = copy.copy(trainer.batches)
    batches.generator = torch.Generator(trainer.device).manual_seed(0)
    other = Trainer(copy.deepcopy(trainer.model), batches, trainer.recipe)
    for _ in range(WARM_STEPS):
        other.step()
    wait(trainer.device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def right(course: Course, step: int, test: Pictures, size: int, batch: int) -> Tensor:
    """Which pictures the average of that step names rightly. -> bool [N] on the CPU"""
    model = course.trainer.model
    present = [p.detach().clone() for p in course.trainer.weights]
    torch._foreach_copy_(course.trainer.weights, course.kept[step])
    model.eval()
    found = []
    for start in range(0, len(test), batch):
        with half(course.trainer.device), torch.compiler.set_stance("force_eager"):  # nothing is compiled to judge
            logits = model(enlarged(test.images[start : start + batch], size))
        found.append(logits.argmax(-1) == test.labels[start : start + batch])
    model.train()
    torch._foreach_copy_(course.trainer.weights, present)
    return torch.cat(found).cpu()


def last_common(courses: list[Course]) -> int:
    """The largest step that all of them kept."""
    return max(set.intersection(*(set(c.kept) for c in courses)))
