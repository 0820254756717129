"""`EmojiPipeline`: a diffusers pipeline that turns prompts of the emoji world into images.

Notable choices
- Components are a stock `FluxTransformer2DModel`, a `TextTable` and a stock `FlowMatchEulerDiscreteScheduler`, so anything
  that plugs into diffusers' Flux plugs in here: attention processors, hooks, step caches, offload, LoRA.
- It is the world's pipeline (`WorldPipeline`: schedule, guidance, callbacks, per-sample noise, cache contexts) with another
  network call and single images.
- Image ids are (0, row, column) whole numbers, one tensor per frame size, as in Flux; which trained size a frame is
  nearest to is told in the prompt's last slot.

B samples, S height = width, a multiple of 64; latents [B, 3, S, S] in about [-1, 1], images [B, 3, S, S] in [0, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from foveal.pipelines.emoji.flow import pack, seeded_noise, to_images, token_ids, unpack
from foveal.pipelines.emoji.models import SHIFTS
from foveal.pipelines.emoji.text import TextTable, pooled
from foveal.pipelines.emoji.vocabulary import CANVASES, UNITS, canvas_of, parse
from foveal.pipelines.errors import UserError
from foveal.pipelines.world.pipeline import StepCallback, WorldPipeline, _check_request

LARGEST = 1024  # pixels


@dataclass
class EmojiOutput(BaseOutput):
    """images: [B, 3, S, S] fp32 in [0, 1] ("pt"), the same in numpy ("np"), or the latents ("latent").
    latents: [B, 3, S, S] fp32, the last point of the sampling path, not clamped."""

    images: Tensor | np.ndarray
    latents: Tensor


class EmojiPipeline(WorldPipeline):
    """Text to image in the emoji world. Made by `foveal.pipelines.shipped.load`.

    size, steps, guidance: what a call uses unless told otherwise. shifts: of the noise levels, by trained size in pixels, as
    {"128": 4.0}. `pipe.set_progress_bar_config(disable=True)` turns the progress bar off.
    """

    text: TextTable  # type: ignore[assignment]

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text: TextTable,
        scheduler: FlowMatchEulerDiscreteScheduler,
        size: int = 128,
        steps: int = 8,
        guidance: float = 1.0,
        shifts: dict[str, float] | None = None,
    ) -> None:
        DiffusionPipeline.__init__(self)  # the components and the config are this class's own
        self.register_modules(transformer=transformer, text=text, scheduler=scheduler)
        shifts = shifts or {str(trained): shift for trained, shift in SHIFTS.items()}
        self.register_to_config(size=size, steps=steps, guidance=guidance, shifts=shifts)
        self._own_shift = scheduler.shift
        self._current_timestep: Tensor | None = None
        self._num_timesteps = 0
        self._guidance_scale = guidance
        self._size = size

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: str = "pt",
        *,
        size: int | None = None,
    ) -> EmojiOutput:
        """Sample one image per (prompt, seed) pair.

        steps >= 1 and guidance: None takes the model's recommended values; guidance 1 costs one forward a step, anything
        else two. latents [B, 3, S, S]: start noise in place of the seeds'. size (pixels, a multiple of 64): other than a
        trained size for timing or extrapolation.

        callback_on_step_end(pipe, step, timestep, kwargs) runs after each step, as in `WorldPipeline`.

        Raises UserError, a ValueError (one sentence): a prompt outside the grammar, unequal numbers of prompts and seeds,
        bad steps, guidance, seeds, latents, size or output type.
        """
        self._size = self._frame(size)
        steps, guidance = self._sampler(steps, guidance)
        _check_request(prompts, seeds, output_type)
        self.check_prompts(prompts)
        device = self._execution_device
        x = self._noise(latents, seeds).to(device)
        cond, null = self._encode(prompts, guidance)
        self._set_schedule(steps, device, CANVASES[canvas_of(self._size)])
        x = self._denoise(x, cond, null, guidance, callback_on_step_end)
        self.maybe_free_model_hooks()
        image = x if output_type == "latent" else to_images(x)
        return EmojiOutput(images=image.cpu().numpy() if output_type == "np" else image, latents=x)

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

        latents [B, 3, S, S] at the noise level of `step` (from 0) of a path of `steps`.  -> same shape, fp32
        """
        steps, guidance = self._sampler(steps, guidance)
        if not 0 <= step < steps:
            raise UserError(f"step {step} is outside a path of {steps} steps: use 0 to {steps - 1}.")
        self.check_prompts(prompts)
        if latents.ndim != 4 or len(latents) != len(prompts):
            raise UserError(f"latents {tuple(latents.shape)} do not fit {len(prompts)} prompts: pass [B, 3, S, S].")
        self._size = self._frame(latents.shape[-1])
        device = self._execution_device
        self._set_schedule(steps, device, CANVASES[canvas_of(self._size)])
        cond, null = self._encode(prompts, guidance)
        return self._predict(latents.to(device), step, cond, null, guidance)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises PromptError, a UserError, for a prompt outside the grammar."""
        for prompt in prompts:
            parse(prompt)

    def _encode(self, prompts: Sequence[str], guidance: float) -> tuple[Tensor, Tensor | None]:
        self._guidance_scale = guidance
        cond = self.text.encode(prompts, self._size)
        return cond, self.text.null(len(prompts)) if guidance != 1 else None

    def _branch(self, name: str, x: Tensor, i: int, timestep: Tensor, encoding: Tensor) -> Tensor:
        """One network call; Flux is given sigma and multiplies by 1000 itself."""
        dtype = self.transformer.dtype
        img_ids, txt_ids = token_ids(x.shape[-1], x.device)
        place: dict[str, Any] = {"step_index": i, "sigma": self._sigma(i), "num_inference_steps": self._num_timesteps}
        with self.transformer.cache_context(name, **place):
            out = self.transformer(
                hidden_states=pack(x).to(dtype),
                encoder_hidden_states=encoding.to(dtype),
                pooled_projections=pooled(encoding).to(dtype),
                timestep=(timestep / 1000).expand(len(x)),
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )
        return unpack(out[0]).float()

    def _frame(self, size: int | None) -> int:
        size = self.config["size"] if size is None else size
        if size % UNITS or not UNITS <= size <= LARGEST:
            raise UserError(f"size is {size} px: use a multiple of {UNITS}, at most {LARGEST}.")
        return size

    def _noise(self, latents: Tensor | None, seeds: Sequence[int]) -> Tensor:
        if latents is None:
            return seeded_noise(seeds, self._size)
        expected = (len(seeds), 3, self._size, self._size)
        if tuple(latents.shape) != expected:
            raise UserError(f"latents have shape {tuple(latents.shape)}, but {expected} is needed: [B, 3, S, S].")
        return latents.float()
