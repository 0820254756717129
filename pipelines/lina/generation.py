"""A study's model when it is a LINA: checked classes and methods, facts for the record, and a generator."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.errors import UserError
from foveal.pipelines.generator import Clip, Generator, OnStep
from foveal.pipelines.lina.watching import Watch
from foveal.pipelines.schema import StudyConfig
from foveal.plugins.method import Method
from foveal.vision.lina_head import noise_levels

TOY = "is a small model of small grey pictures. Its numbers are not, and do not predict, numbers of any large model."


@dataclass(frozen=True)
class LinaGenerator(Generator):
    """Prompts are names of classes."""

    watches: list[Watch] = field(default_factory=list)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.pipe.model,)

    def sigmas(self) -> list[float] | None:
        """Noise levels of the head, not of the steps in which tokens appear."""
        return noise_levels(self.pipe.defaults.num_diffusion_steps)

    def copies(self, n: int) -> list[Generator] | None:
        return [self, *(replace(self, pipe=copy.deepcopy(self.pipe), watches=[]) for _ in range(n - 1))]

    def attach(self, method: Method) -> Any:
        """A watch on the model. Raises UserError for any method that would replace its attention."""
        check_method(str(self.facts["id"]), method.name)
        self.watches[:] = [Watch(self.pipe.model)]
        return self.watches[0]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], on_step: OnStep | None = None, steps: int | None = None
    ) -> Clip:
        watches = list(self.watches)
        for watch in watches:
            watch.restart()

        def after(*_: Any) -> None:
            for watch in watches:
                watch.step_done()
            if on_step is not None:
                on_step()

        out = self.pipe(
            list(prompts), steps or self.steps, guidance_scale=self.facts["guidance"], callback_on_step_end=after,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )  # fmt: skip
        return Clip(out.images[:, None].expand(-1, -1, 3, -1, -1).float().cpu(), out.latents.float().cpu())

    def reading(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 3, S, S] in [0, 1] -> the class that the judge sees in each first frame, [B]"""
        return self.pipe.recognise(frames[:, 0].mean(1, keepdim=True))


def check_method(model: str, name: str) -> None:
    """Only dense: there is no softmax to replace."""
    if name != "dense":
        raise UserError(
            f"{model} was trained with linear attention, and softmax and linear attention cannot be swapped without training: "
            f"{name} has nothing to make sparse here; list only the method dense."
        )


def lina_generator(study: StudyConfig, source: str | Path, device: torch.device, dtype: torch.dtype) -> LinaGenerator:
    """A LINA, by shipped name or folder. Raises UserError in one sentence for whatever does not fit."""
    from foveal.pipelines import shipped

    for entry in study.methods:
        check_method(study.model, entry.name)
    pipe = shipped.load(source, device=device, dtype=dtype)
    card = pipe.card
    if study.frames not in (None, 1) or {study.height, study.width} - {None, card.size}:
        raise UserError(
            f"frames is {study.frames}, height {study.height}, width {study.width}; {card.id} makes single pictures of "
            f"{card.size} x {card.size} pixels: leave them out."
        )
    pipe.numbers(study.prompts)
    steps = study.sampler.steps or card.steps
    guidance = card.guidance if study.sampler.guidance is None else study.sampler.guidance
    pipe._sampling(steps, None, guidance, None)
    facts = {
        "id": card.id, "kind": card.kind, "sha256": card.sha256, "tokens": card.tokens, "grid": list(card.grid), "frames": 1,
        "size": card.size, "steps": steps, "flow_steps": pipe.defaults.num_diffusion_steps, "guidance": guidance,
        "dtype": str(dtype).removeprefix("torch."), "device": device.type, "params": card.params, "layers": card.layers,
        "heads": card.heads, "head_dim": card.head_dim, "toy": card.toy, "toy_text": TOY, "note": card.note, "classes": list(pipe.classes),
    }  # fmt: skip
    return LinaGenerator(pipe, facts, device, world=False)
