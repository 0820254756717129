"""The judge: a small classifier of our own, and the distance of two sets of pictures in its features.

N pictures, S their side, F = 64 features.

Notable choices
- Trained in the same run as the generator, on real pictures only; numbers in its features compare samples of this data with each
  other and with real pictures, and with nothing that other networks measured.
- Kept as fp16 and used as what was kept, so that whoever loads it gets the same numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.pipelines.lina.data import Pictures, to_network

FEATURES = 64
BATCH = 2_000


class Judge(nn.Module):
    """Pictures [N, 1, S, S] in [-1, 1] -> features [N, 64] and logits [N, classes]; any S of 8 and more."""

    def __init__(self, classes: int):
        super().__init__()
        widths = (1, 32, FEATURES, FEATURES, FEATURES)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.out = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.gelu(norm(layer(x)))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


def train_judge(pictures: Pictures, classes: int, steps: int, batch: int = 512, seed: int = 0) -> Judge:
    """A judge of real pictures, on their device; AdamW, one cycle, label smoothing.  -> with the weights that are kept"""
    device = pictures.labels.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(classes).to(device)
    rng = torch.Generator(device=device).manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        index = torch.randint(len(pictures), (batch,), generator=rng, device=device)
        loss = F.cross_entropy(judge(to_network(pictures.images[index])), pictures.labels[index], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for p in judge.parameters():
            p.copy_(p.half().float())
    return judge.eval()


@torch.no_grad()
def look(judge: Judge, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [N, 1, S, S] in [-1, 1] -> features [N, 64] in fp64 and the classes seen, [N]"""
    found, seen = [], []
    for part in x.split(BATCH):
        features = judge.features(part.clamp(-1, 1))
        found.append(features.double())
        seen.append(judge.out(features).argmax(1))
    return torch.cat(found), torch.cat(seen)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the two normal distributions fitted to features [N, F] and [N', F], in fp64."""
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"{len(a)} and {len(b)} pictures have no covariance; at least two on each side are needed.")
    a, b = a.double().cpu(), b.double().cpu()
    first, second = torch.cov(a.mT), torch.cov(b.mT)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross)


T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of 2 to 10 independent distances (Student's t, nothing below 0); None for one."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    half = T_975[n - 1] * math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return [max(0.0, mean - half), mean + half]
