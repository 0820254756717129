"""Generation with LINA: which tokens appear at which step, and the loop over steps.

Letters: B batch, n image tokens, K steps, S flow steps, W numbers of a token.
Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens".

Notable choices
- Every sample has its own generator, on the CPU, from which its order of positions and its noise are drawn in a fixed sequence:
  a sample depends on its seed and never on its batch.
- Guidance rises in a line from ``min_guidance_scale`` to ``guidance_scale``; at 1 the second half of the batch is not computed.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.vision.lina import LinaModel
from foveal.vision.lina_head import denoise, noise_levels

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """How an image is sampled.

    num_inference_steps    K; more than n are n, with a warning
    num_diffusion_steps    S, of every token
    guidance_scale         at the last step; at least 1, which is no guidance and half the work
    min_guidance_scale     where the ramp begins; None: no ramp
    shift                  of the noise levels
    """

    num_inference_steps: int
    num_diffusion_steps: int = 25
    guidance_scale: float = 1.0
    min_guidance_scale: float | None = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; at least 1 is needed.")
        noise_levels(self.num_diffusion_steps, self.shift)
        low = self.guidance_scale if self.min_guidance_scale is None else self.min_guidance_scale
        if not (1 <= low < math.inf and 1 <= self.guidance_scale < math.inf):
            raise ValueError(
                f"guidance_scale is {self.guidance_scale} and min_guidance_scale {self.min_guidance_scale}; both must be at least 1 (no guidance)."
            )

    def guidance(self, steps: int) -> list[float]:
        """The scale of each of the steps that have work."""
        high = self.guidance_scale
        low = high if self.min_guidance_scale is None else self.min_guidance_scale
        return [low + (high - low) * (i + 1) / steps for i in range(steps)]


def counts_of_steps(tokens: int, steps: int) -> list[int]:
    """How many tokens each step adds, by a cosine: few first. Steps without work are left out; the sum is ``tokens``."""
    left = [round(tokens * math.cos(math.pi / 2 * i / steps)) for i in range(steps + 1)]
    return [a - b for a, b in itertools.pairwise(left) if a > b]


@torch.no_grad()
def generate(
    model: LinaModel, condition: tuple[Tensor | None, ...], sampling: Sampling, generators: Sequence[torch.Generator],
    on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    """Latents of one sample per generator.

    condition    labels [B], or text states and words; generators: one a sample, on the CPU
    on_step      (step, latents so far [B, C, side, side]) after each step
    -> [B, C, side, side] fp32. Raises ValueError for a condition that does not fit the generators or the classes.
    """
    config, device, b = model.config, model.mask_token.device, len(generators)
    _check(model, condition, b)
    counts = counts_of_steps(config.tokens, _clipped(sampling.num_inference_steps, config.tokens))
    order = torch.stack([torch.randperm(config.tokens, generator=g) for g in generators]).to(device)
    scales = sampling.guidance(len(counts))
    guided = max(scales) > 1
    queries = model.queries(*(x if x is None else x.to(device) for x in condition))
    if guided:
        queries = torch.cat([queries, model.queries(model.condition.null(b, device))])
    tokens = torch.zeros(b, config.tokens, config.token_width, device=device)
    start = 0
    for step, (count, scale) in enumerate(zip(counts, scales, strict=True)):
        known, following = order[:, :start], order[:, start : start + count]
        drawn = [torch.randn(count, config.token_width, generator=g) for g in generators]
        fresh = _tokens(model, tokens, queries, known, following, torch.stack(drawn).to(device), sampling, scale)
        tokens = tokens.scatter(1, following[..., None].expand_as(fresh), fresh)
        start += count
        if on_step is not None:
            on_step(step, model.unpatchify(tokens))
    return model.unpatchify(tokens)


def _tokens(
    model: LinaModel, tokens: Tensor, queries: Tensor, known: Tensor, following: Tensor, noise: Tensor, sampling: Sampling, scale: float
) -> Tensor:  # fmt: skip
    """The latents of the next tokens, [B, count, W]"""
    halves = len(queries) // len(tokens)
    given = tokens.to(queries.dtype).repeat(halves, 1, 1)
    z = model.trunk(given, queries, known.repeat(halves, 1))
    z = z.gather(1, following.repeat(halves, 1)[..., None].expand(-1, -1, z.shape[2])).flatten(0, 1)
    cond, null = z.chunk(2) if halves == 2 else (z, None)
    flow = {"guidance": scale, "shift": sampling.shift}
    return denoise(
        model.head, cond, noise.flatten(0, 1), sampling.num_diffusion_steps, z_null=null, **flow
    ).view_as(noise)  # fmt: skip


def _clipped(steps: int, tokens: int) -> int:
    if steps > tokens:
        warnings.warn(
            f"{steps} steps were asked for and an image has {tokens} tokens: {tokens} are made.", stacklevel=3
        )
    return min(steps, tokens)


def _check(model: LinaModel, condition: tuple[Tensor | None, ...], batch: int) -> None:
    first, classes = condition[0], model.config.num_classes
    if first is None or batch != len(first) or not batch:
        given = 0 if first is None else len(first)
        raise ValueError(
            f"there are {given} conditions and {batch} generators; give one generator a sample, at least one."
        )
    if classes is not None and (first.is_floating_point() or bool(((first < 0) | (first > classes)).any())):
        raise ValueError(
            f"labels are {first.tolist()}; integers from 0 to {classes} are needed, {classes} for no class."
        )
