"""`WorldPipeline`: a diffusers pipeline that turns prompts of the world into clips.

Notable choices
- Components are a stock `WanTransformer3DModel`, a `TextTable` and a stock `FlowMatchEulerDiscreteScheduler`, so
  anything that plugs into diffusers' Wan plugs in here: attention processors, hooks, step caches, offload, LoRA.
- Pixels are the latents: there is no VAE.
- Noise is drawn on the CPU, per sample, from its own seed: a batch of two equals two batches of one.
- A model may have been trained at several sizes, each with its own shift of the noise levels (`shifts`); another size
  takes the scheduler's own. How many objects it knows is in its config, and a prompt with more is refused.
- Each transformer call runs inside `cache_context("cond" | "uncond", step_index=..., sigma=...,
  num_inference_steps=...)`, as in diffusers' own Wan pipeline.

B clips, T frames, S height = width; latents are [B, 3, T, S, S] in about [-1, 1], frames [B, T, 3, S, S] in [0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from foveal.pipelines.errors import UserError
from foveal.pipelines.slot_table import SlotTable
from foveal.pipelines.world import flow
from foveal.pipelines.world.text import TextTable
from foveal.pipelines.world.vocabulary import require_objects

if TYPE_CHECKING:
    from foveal.pipelines.shipped import Card

StepCallback = Callable[["WorldPipeline", int, Tensor, dict[str, Any]], "dict[str, Any] | None"]


@dataclass
class WorldOutput(BaseOutput):
    """frames: [B, T, 3, S, S] fp32 in [0, 1] ("pt"), the same in numpy ("np"), or the latents ("latent").
    latents: [B, 3, T, S, S] fp32, the last point of the sampling path, not clamped."""

    frames: Tensor | np.ndarray
    latents: Tensor


class WorldPipeline(DiffusionPipeline):
    """Text to video in the procedural world. Made by `foveal.pipelines.shipped.load`.

    frames, size: the clip the model was trained on. steps, guidance: what a call uses unless told otherwise. objects:
    how many a prompt may name. shifts: of the noise levels, by size in pixels, as {"32": 6.0}.
    `pipe.set_progress_bar_config(disable=True)` turns the progress bar off.
    """

    model_cpu_offload_seq = "text->transformer"  # type: ignore[assignment]
    layout = "[B, 3, T, S, S]"  # of the latents

    transformer: Any  # WanTransformer3DModel; diffusers types its configs as plain dictionaries
    text: TextTable
    scheduler: Any  # FlowMatchEulerDiscreteScheduler
    card: Card  # facts about the weights, set by `load`

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text: TextTable,
        scheduler: FlowMatchEulerDiscreteScheduler,
        frames: int = 16,
        size: int = 64,
        steps: int = 8,
        guidance: float = 1.0,
        objects: int = 1,
        shifts: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        config = {"frames": frames, "size": size, "steps": steps, "guidance": guidance, "objects": objects}
        self._set_up(transformer, text, scheduler, **config, shifts=shifts or {})

    def _set_up(self, transformer: Any, text: SlotTable, scheduler: Any, **config: Any) -> None:
        """Components, config and the state of a call."""
        self.register_modules(transformer=transformer, text=text, scheduler=scheduler)
        self.register_to_config(**config)
        self._own_shift = scheduler.shift
        self._current_timestep: Tensor | None = None
        self._num_timesteps = 0
        self._guidance_scale = config["guidance"]

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep being computed (1000 sigma), None outside a call; diffusers' caches read it."""
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: str = "pt",
        *,
        frames: int | None = None,
        size: int | None = None,
    ) -> WorldOutput:
        """Sample one clip per (prompt, seed) pair.

        steps >= 1 and guidance: None takes the model's recommended values; guidance 1 costs one forward a step,
        anything else two. latents [B, 3, T, S, S]: start noise in place of the seeds'. frames, size (pixels):
        another clip than the model was trained on, for timing or extrapolation.

        callback_on_step_end(pipe, step, timestep, kwargs) runs after each step; kwargs holds `latents` (after it),
        `latents_before`, `velocity` (guided), `sigma`, `sigma_next`, `step_index` and `prompt_embeds`. A returned
        dict may replace `latents`; None changes nothing. To evaluate the model at a given point use `velocity`.

        Raises UserError, a ValueError (one sentence): a prompt outside the grammar, unequal numbers of prompts and
        seeds, bad steps, guidance, seeds, latents, clip or output type.
        """
        frames, size = self._clip(frames, size)
        shape = (self.transformer.config.in_channels, frames, size, size)
        request = (prompts, seeds, steps, guidance, latents, callback_on_step_end, output_type)
        video, last = self._sample(*request, shape=shape)
        return WorldOutput(frames=video, latents=last)

    def _sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None,
        guidance: float | None,
        latents: Tensor | None,
        callback: StepCallback | None,
        output_type: str,
        *,
        shape: tuple[int, ...],
    ) -> tuple[Tensor | np.ndarray, Tensor]:
        """A whole call. shape: of one sample's latents.  -> (what was asked for, the latents)"""
        steps, guidance = self._sampler(steps, guidance)
        _check_request(prompts, seeds, output_type)
        self.check_prompts(prompts)
        device = self._execution_device
        x = self._start(latents, seeds, shape).to(device)
        cond, null = self._encode(prompts, guidance, shape[-1])
        self._set_schedule(steps, device, shape[-1])
        x = self._denoise(x, cond, null, guidance, callback)
        self.maybe_free_model_hooks()
        pixels = x if output_type == "latent" else self._pixels(x)
        return (pixels.cpu().numpy() if output_type == "np" else pixels), x

    @torch.no_grad()
    def velocity(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        step: int,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """The velocity at one given point of a sampling path, for teacher-forced comparisons.

        latents, as a call returns them, at the noise level of `step` (from 0) of a path of `steps`.  -> same shape, fp32
        """
        steps, guidance = self._sampler(steps, guidance)
        if not 0 <= step < steps:
            raise UserError(f"step {step} is outside a path of {steps} steps: use 0 to {steps - 1}.")
        self.check_prompts(prompts)
        if latents.ndim != self.layout.count(",") + 1 or len(latents) != len(prompts):
            raise UserError(f"latents {tuple(latents.shape)} do not fit {len(prompts)} prompts: pass {self.layout}.")
        device = self._execution_device
        self._set_schedule(steps, device, latents.shape[-1])
        cond, null = self._encode(prompts, guidance, latents.shape[-1])
        return self._predict(latents.to(device), step, cond, null, guidance)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises PromptError, a UserError: a prompt outside the grammar, or with more objects than the model knows."""
        name = self.card.id if hasattr(self, "card") else "this model"
        require_objects(prompts, self.config["objects"], name)

    def _denoise(
        self, x: Tensor, cond: Tensor, null: Tensor | None, guidance: float, callback: StepCallback | None
    ) -> Tensor:
        with self.progress_bar(total=self._num_timesteps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                before, v = x, self._predict(x, i, cond, null, guidance)
                x = self.scheduler.step(v, t, x, return_dict=False)[0]
                if callback is not None:
                    facts = {"latents": x, "latents_before": before, "velocity": v, "step_index": i}
                    facts |= {"sigma": self._sigma(i), "sigma_next": self._sigma(i + 1), "prompt_embeds": cond}
                    x = (callback(self, i, t, facts) or {}).get("latents", x)
                bar.update()
        return x

    def _set_schedule(self, steps: int, device: torch.device, size: int | None = None) -> None:
        """sigma_i = s t / (1 + (s - 1) t) with t = 1, 1 - 1/steps, ..., and 0 at the end; the scheduler applies s."""
        self.scheduler.set_shift(self.config["shifts"].get(str(size), self._own_shift))
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=device)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = steps
        self._sigmas = self.scheduler.sigmas.tolist()

    def _sigma(self, i: int) -> float:
        return self._sigmas[i]

    def _encode(self, prompts: Sequence[str], guidance: float, size: int) -> tuple[Tensor, Tensor | None]:
        self._guidance_scale = guidance
        cond = self._words(prompts, size)
        return cond, self.text.null(len(prompts)) if guidance != 1 else None

    def _words(self, prompts: Sequence[str], size: int) -> Tensor:
        return self.text.encode(prompts)

    def _pixels(self, latents: Tensor) -> Tensor:
        return flow.to_frames(latents)

    def _predict(self, x: Tensor, i: int, cond: Tensor, null: Tensor | None, guidance: float) -> Tensor:
        """Guided velocity at step i, fp32."""
        self._current_timestep = timestep = self.scheduler.timesteps[i]
        try:
            v = self._branch("cond", x, i, timestep, cond)
            if null is None:
                return v
            v_null = self._branch("uncond", x, i, timestep, null)
            return v_null + guidance * (v - v_null)
        finally:
            self._current_timestep = None

    def _branch(self, name: str, x: Tensor, i: int, timestep: Tensor, encoding: Tensor) -> Tensor:
        place: dict[str, Any] = {"step_index": i, "sigma": self._sigma(i), "num_inference_steps": self._num_timesteps}
        with self.transformer.cache_context(name, **place):
            return self._network(x, timestep.expand(len(x)), encoding).float()

    def _network(self, x: Tensor, timestep: Tensor, encoding: Tensor) -> Tensor:
        """One network call.  timestep [B] -> the shape of x"""
        dtype = self.transformer.dtype
        return flow.velocity(self.transformer, x.to(dtype), timestep, encoding.to(dtype))

    def _sampler(self, steps: int | None, guidance: float | None) -> tuple[int, float]:
        steps = self.config["steps"] if steps is None else steps
        guidance = self.config["guidance"] if guidance is None else guidance
        if not isinstance(steps, int) or steps < 1:
            raise UserError(
                f"steps is {steps!r}: use a whole number of at least 1 (recommended {self.config['steps']})."
            )
        if not math.isfinite(guidance) or guidance < 0:
            raise UserError(f"guidance is {guidance!r}: use a finite number of at least 0 (1 switches it off).")
        return steps, float(guidance)

    def _clip(self, frames: int | None, size: int | None) -> tuple[int, int]:
        frames = self.config["frames"] if frames is None else frames
        size = self.config["size"] if size is None else size
        config = self.transformer.config
        pt, ph, pw = config.patch_size
        limit = config.rope_max_seq_len
        if frames % pt or size % ph or size % pw or not (pt <= frames <= pt * limit and ph <= size <= ph * limit):
            raise UserError(
                f"a clip of {frames} frames of {size} px does not fit patches {(pt, ph, pw)}: "
                f"use multiples of them, at most {pt * limit} frames and {ph * limit} px."
            )
        return frames, size

    def _start(self, latents: Tensor | None, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        if latents is None:
            return flow.seeded_noise(seeds, *shape)
        expected = (len(seeds), *shape)
        if tuple(latents.shape) != expected:
            raise UserError(f"latents have shape {tuple(latents.shape)}, but {expected} is needed: {self.layout}.")
        return latents.float()


def _check_request(prompts: Sequence[str], seeds: Sequence[int], output_type: str) -> None:
    if isinstance(prompts, str):
        raise UserError(f"prompts is one string, {prompts!r}: pass a list, [{prompts!r}].")
    if isinstance(seeds, int) or len(prompts) != len(seeds) or len(prompts) == 0:
        count = 1 if isinstance(seeds, int) else len(seeds)
        raise UserError(f"{len(prompts)} prompts and {count} seeds: pass two lists of one length, one seed a prompt.")
    bad = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63]
    if bad:
        raise UserError(f"seed {bad[0]!r} is not usable: seeds are whole numbers from 0 to 2**63 - 1.")
    if output_type not in ("pt", "np", "latent"):
        raise UserError(f"output_type {output_type!r} is unknown: use 'pt', 'np' or 'latent'.")
