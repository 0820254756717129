"""Training LINA: masks, the flow-matching loss of hidden tokens, the optimizer, the average.

B pictures, n tokens of a picture, L at most so many of them visible, W numbers of a token.

Notable choices
- All random numbers of a step come from (seed, step): a resumed run repeats an uninterrupted one.
- Every picture has a number of visible tokens of its own; the list of them has one length for all (L), filled up and masked: every
  step has the same shapes, one graph, few launches.
- The caller says how far the run is (``progress`` in [0, 1]): the learning rate warms up by step, stays, and falls to 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.lina.data import Pictures, to_network
from foveal.pipelines.lina.models import Recipe
from foveal.vision.lina import LinaModel
from foveal.vision.lina_attention import LinearAttention
from foveal.vision.lina_config import LinaConfig

FLOOR = 0.02  # last learning rate, relative to the peak
SMOOTHING = 0.98  # of the logged loss


@dataclass(frozen=True)
class Draw:
    """The random part of a step: which pictures, which labels are dropped, what is visible, noise and its levels.

    index [B], dropped [B] bool, visible [B, L], valid [B, L] bool, sigma [draws, B, n], noise [draws, B, n, W]
    """

    index: Tensor
    dropped: Tensor
    visible: Tensor
    valid: Tensor
    sigma: Tensor
    noise: Tensor


def most_visible(recipe: Recipe, tokens: int) -> int:
    """L"""
    return round((1 - recipe.mask_low) * tokens)


def hidden_shares(n: int, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """Normal around 1 with ``mask_std``, between ``mask_low`` and 1, by the inverse of its distribution.  -> [n]"""
    width = math.erf((1 - recipe.mask_low) / (recipe.mask_std * math.sqrt(2)))
    u = torch.rand(n, generator=rng, device=rng.device) * width
    return (1 - math.sqrt(2) * recipe.mask_std * torch.erfinv(u)).clamp(recipe.mask_low, 1)


def draw(recipe: Recipe, config: LinaConfig, pictures: int, rng: torch.Generator) -> Draw:
    """Everything random of a step."""
    b, n, device = recipe.batch, config.tokens, rng.device
    many = most_visible(recipe, n)
    index = torch.randint(pictures, (b,), generator=rng, device=device)
    dropped = torch.rand(b, generator=rng, device=device) < recipe.dropout
    visible = torch.rand(b, n, generator=rng, device=device).argsort(1)[:, :many]
    seen = ((1 - hidden_shares(b, recipe, rng)) * n).round()
    valid = torch.arange(many, device=device) < seen[:, None]
    sigma = torch.randn(recipe.draws, b, n, generator=rng, device=device).sigmoid()
    noise = torch.randn(recipe.draws, b, n, config.token_width, generator=rng, device=device)
    return Draw(index, dropped, visible, valid, sigma, noise)


def hidden_loss(model: LinaModel, tokens: Tensor, labels: Tensor, given: Draw) -> Tensor:
    """Squared error of the velocity, over hidden tokens.  tokens [B, n, W], labels [B] -> 0-d fp32"""
    n = tokens.shape[1]
    seen = torch.zeros(len(tokens), n + 1, device=tokens.device)
    seen = seen.scatter(1, torch.where(given.valid, given.visible, n), 1.0)[:, :n]
    z = model(tokens, (labels,), given.visible, given.valid)
    level = given.sigma[..., None]
    v = model.head(level * given.noise + (1 - level) * tokens, given.sigma, model.head.condition(z))
    error = (v.float() - (given.noise - tokens)).square().mean((0, 3))
    return (error * (1 - seen)).sum() / ((1 - seen).sum() + 1e-5)


class Trainer:
    """A model and everything that changes while it is trained.

    Attributes: step (steps done), loss (smoothed, 0-d tensor or None), named (trained parameters by name), ema (averages of all
    parameters by name), optimizer.
    """

    def __init__(self, model: LinaModel, pictures: Pictures, recipe: Recipe, device: torch.device) -> None:
        self.model, self.recipe, self.device = model.to(device), recipe, device
        self.pictures = pictures.to(device)
        for module in model.modules():
            if isinstance(module, LinearAttention):
                module.implementation = (
                    "torch"  # a graph of plain operations; at these lengths nothing is gained by a kernel
                )
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.optimizer = self._optimizer()
        self.generator = torch.Generator(device=device)
        self.step = 0
        self.loss: Tensor | None = None

    @property
    def bf16(self) -> bool:
        return self.device.type == "cuda"

    def train_step(self, progress: float) -> Tensor:
        """One step.  -> its loss, 0-d, not synchronised"""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, progress)
        loss = self.loss_of(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = list(self.named.values())
        nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        self.optimizer.step()
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        averages = [self.ema[name] for name in self.named]
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - keep)
        loss = loss.detach()
        self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.step += 1
        return loss

    def loss_of(self, step: int) -> Tensor:
        """The loss of the random numbers of one step."""
        recipe, config = self.recipe, self.model.config
        rng = self.generator.manual_seed(recipe.seed * 1_000_003 + step)
        given = draw(recipe, config, len(self.pictures), rng)
        tokens = self.model.patchify(to_network(self.pictures.images[given.index]))
        assert config.num_classes is not None
        labels = self.pictures.labels[given.index].masked_fill(given.dropped, config.num_classes)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return hidden_loss(self.model, tokens, labels, given)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights and is in evaluation mode."""
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.put(self.ema)
        self.model.eval()
        try:
            yield
        finally:
            self.put(kept)
            self.model.train()

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Copy weights in, by name; every name must be there."""
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    def _optimizer(self) -> torch.optim.AdamW:
        free = {
            n
            for n, p in self.named.items()
            if p.ndim < 2 or n.endswith("_scale") or "token" in n or n.startswith(("condition.", "connector.query"))
        }
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in self.named.items() if n not in free], "weight_decay": self.recipe.weight_decay},
            {"params": [p for n, p in self.named.items() if n in free], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.lr, betas=(0.9, 0.95), fused=self.device.type == "cuda")


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Peak rate x linear warm-up by step x linear decay by progress."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    late = max(0.0, progress - (1 - recipe.decay)) / recipe.decay if recipe.decay > 0 else 0.0
    return recipe.lr * warm * max(FLOOR, 1 - (1 - FLOOR) * late)
