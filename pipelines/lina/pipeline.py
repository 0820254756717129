"""``LinaPipeline``: class labels in, pictures out. Arguments are named as in diffusers; diffusers itself is not needed.

    pipe = foveal.load("lina-fashion")
    pictures = pipe(["ankle boot", "bag"], generator=torch.Generator().manual_seed(0)).images

Notable choices
- Sample i of a batch depends on its own generator and on nothing else; one generator gives every sample a seed, in order.
- One call of the trunk a step and ``num_diffusion_steps`` calls of the head: time grows with both.

B samples, S pixels of a side
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.pipelines.errors import UserError
from foveal.pipelines.lina.data import to_pictures
from foveal.pipelines.lina.judge import Judge, look
from foveal.vision.lina import LinaModel
from foveal.vision.lina_generate import Sampling, generate

OUTPUTS = ("pt", "np", "pil", "latent")
Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[["LinaPipeline", int, Any, dict[str, Any]], Any]


@dataclass
class LinaOutput:
    """images: fp32 [B, 1, S, S] in [0, 1] ("pt"), the same in numpy ("np"), a list of Pillow images ("pil"), or the latents
    ("latent"). latents: fp32 [B, C, side, side], not clamped."""

    images: Any
    latents: Tensor


class LinaPipeline:
    """Class-conditional pictures. Made by ``foveal.load``.

    classes      names in the order of their numbers; size: S
    steps, flow_steps, guidance, min_guidance    what a call uses unless told otherwise
    judge        tells classes apart, or None
    """

    card: Any = None

    def __init__(
        self, model: LinaModel, classes: Sequence[str], size: int, steps: int, flow_steps: int, guidance: float, min_guidance: float,
        judge: Judge | None = None,
    ) -> None:  # fmt: skip
        self.model, self.classes, self.size, self.judge = model, tuple(classes), size, judge
        self.defaults = Sampling(steps, flow_steps, guidance, min_guidance)

    @property
    def device(self) -> torch.device:
        return self.model.mask_token.device

    def to(self, device: torch.device | str) -> LinaPipeline:
        self.model.to(device)
        if self.judge is not None:
            self.judge.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[str | int],
        num_inference_steps: int | None = None,
        num_diffusion_steps: int | None = None,
        guidance_scale: float | None = None,
        min_guidance_scale: float | None = None,
        generator: Generators = None,
        output_type: str = "pt",
        callback_on_step_end: StepCallback | None = None,
    ) -> LinaOutput:
        """Sample one picture a label.

        class_labels             names or numbers; the number of classes itself stands for "no class"
        num_inference_steps      steps in which tokens appear, at most one a token (more are clipped with a warning)
        num_diffusion_steps      steps of the head for every token
        guidance_scale           at least 1; 1 is none and halves the work
        min_guidance_scale       where guidance begins; it rises in a line
        generator                one for all, or a list with one a label; None: not repeatable
        output_type              "pt", "np", "pil" or "latent"
        callback_on_step_end     called as (pipe, step, None, {"latents": ...}) after each step

        None takes the model's own values. Raises UserError, a ValueError, in one sentence for what does not fit.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUTS)}.")
        labels = self.numbers(class_labels)
        sampling = self._sampling(num_inference_steps, num_diffusion_steps, guidance_scale, min_guidance_scale)

        def after(step: int, latents: Tensor) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, None, {"latents": latents})

        try:
            latents = generate(self.model, (labels,), sampling, _generators(generator, len(labels)), after)
        except ValueError as err:
            raise UserError(str(err)) from err
        return LinaOutput(self._images(latents, output_type), latents)

    def numbers(self, class_labels: str | int | Sequence[str | int]) -> Tensor:
        """Names or numbers of classes -> int64 [B]. Raises UserError, with the nearest name."""
        given = [class_labels] if isinstance(class_labels, (str, int)) else list(class_labels)
        return torch.tensor([self._number(label) for label in given], dtype=torch.int64)

    def recognise(self, images: Tensor) -> Tensor:
        """The judge's opinion: pictures [B, 1, S, S] in [0, 1] -> classes [B] on the CPU. UserError without a judge."""
        if self.judge is None:
            raise UserError("this model came without a judge; load a folder that holds judge.safetensors.")
        border = (self.model.config.side - self.size) // 2
        x = torch.nn.functional.pad(images.float() * 2 - 1, (border,) * 4, value=-1.0)
        return look(self.judge, x.to(self.device))[1].cpu()

    def _number(self, label: str | int) -> int:
        if isinstance(label, int):
            return label
        names = [name.casefold() for name in self.classes]
        if label.strip().casefold() in names:
            return names.index(label.strip().casefold())
        near = difflib.get_close_matches(label.casefold(), names, n=1, cutoff=0.4)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise UserError(f"there is no class {label!r}{hint}; the classes are {', '.join(self.classes)}.")

    def _sampling(self, steps: int | None, flow: int | None, guidance: float | None, low: float | None) -> Sampling:
        own = self.defaults
        high = own.guidance_scale if guidance is None else guidance
        start = own.min_guidance_scale if low is None else low
        try:
            return Sampling(
                own.num_inference_steps if steps is None else steps,
                own.num_diffusion_steps if flow is None else flow,
                high, start, own.shift,
            )  # fmt: skip
        except ValueError as err:
            raise UserError(str(err)) from err

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = to_pictures(latents, self.size)
        if output_type == "pt":
            return images
        array = images.cpu().numpy()
        if output_type == "np":
            return array
        from PIL import Image

        return [Image.fromarray((picture[0] * 255).round().astype("uint8")) for picture in array]


def _generators(given: Generators, batch: int) -> list[torch.Generator]:
    """One a sample. Raises ValueError when a list has another length."""
    if isinstance(given, Sequence):
        if len(given) != batch:
            raise ValueError(
                f"generator is a list of {len(given)} for {batch} labels; give one a label, or a single generator."
            )
        return list(given)
    seeds = torch.randint(2**62, (batch,), generator=given, device="cpu" if given is None else given.device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
