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

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from foveal.pipelines.emoji.flow import pack, to_images, token_ids, unpack
from foveal.pipelines.emoji.models import SHIFTS
from foveal.pipelines.emoji.text import TextTable, pooled
from foveal.pipelines.emoji.vocabulary import CANVASES, UNITS, canvas_of, parse
from foveal.pipelines.errors import UserError
from foveal.pipelines.world.pipeline import StepCallback, WorldPipeline

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

    layout = "[B, 3, S, S]"

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
        shifts = shifts or {str(trained): shift for trained, shift in SHIFTS.items()}
        self._set_up(transformer, text, scheduler, size=size, steps=steps, guidance=guidance, shifts=shifts)

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
        size = self._frame(size)
        request = (prompts, seeds, steps, guidance, latents, callback_on_step_end, output_type)
        images, last = self._sample(*request, shape=(3, size, size))
        return EmojiOutput(images=images, latents=last)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises PromptError, a UserError, for a prompt outside the grammar."""
        for prompt in prompts:
            parse(prompt)

    def _set_schedule(self, steps: int, device: torch.device, size: int | None = None) -> None:
        super()._set_schedule(steps, device, CANVASES[canvas_of(self._frame(size))])

    def _words(self, prompts: Sequence[str], size: int) -> Tensor:
        return self.text.encode(prompts, size)

    def _pixels(self, latents: Tensor) -> Tensor:
        return to_images(latents)

    def _network(self, x: Tensor, timestep: Tensor, encoding: Tensor) -> Tensor:
        """One network call; Flux is given sigma and multiplies by 1000 itself."""
        dtype = self.transformer.dtype
        img_ids, txt_ids = token_ids(x.shape[-1], x.device)
        out = self.transformer(
            hidden_states=pack(x).to(dtype),
            encoder_hidden_states=encoding.to(dtype),
            pooled_projections=pooled(encoding).to(dtype),
            timestep=timestep / 1000,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )
        return unpack(out[0])

    def _frame(self, size: int | None) -> int:
        size = self.config["size"] if size is None else size
        if size % UNITS or not UNITS <= size <= LARGEST:
            raise UserError(f"size is {size} px: use a multiple of {UNITS}, at most {LARGEST}.")
        return size
