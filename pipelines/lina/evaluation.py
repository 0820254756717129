"""What samples are worth: the share that the judge takes for the class asked for, and their distance to real pictures.

Notable choices
- Several batches of samples with seeds of their own, each compared with all test pictures: the interval of the distance is that of
  the mean over batches; the share's is Wilson's over all samples.
- Real pictures that the judge never saw are measured in the same way: what a perfect model would get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.pipelines.lina.data import Data, Pictures, to_network, to_pictures
from foveal.pipelines.lina.judge import Judge, frechet, look, mean_interval
from foveal.pipelines.statistics import wilson
from foveal.vision.lina import LinaModel
from foveal.vision.lina_generate import Sampling, generate

FIRST_SEED = 10_000_000


def balanced(n: int, classes: int) -> Tensor:
    """[n] labels, every class as often"""
    return torch.arange(n) % classes


def sample(model: LinaModel, labels: Tensor, first_seed: int, sampling: Sampling, *, bf16: bool = False) -> Tensor:
    """One sample a label, sample i with seed first_seed + i.  -> [N, 1, S, S]"""
    device = model.mask_token.device
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(labels))]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return generate(model, (labels,), sampling, generators)


class Measure:
    """A judge and the real pictures that everything is compared with."""

    def __init__(self, judge: Judge, test: Pictures) -> None:
        self.judge = judge
        self.features, seen = look(judge, to_network(test.images))
        self.accuracy = (seen == test.labels).double().mean().item()  # of the judge, on real pictures

    def batches(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """batches: (pictures [N, 1, S, S], labels [N]) each.  -> facts for the card"""
        right, distances, total = 0, [], 0
        by_class: dict[int, list[int]] = {}
        for x, labels in batches:
            features, seen = look(self.judge, x)
            labels = labels.to(seen.device)
            right += int((seen == labels).sum())
            total += len(labels)
            distances.append(frechet(features, self.features))
            for label in labels.unique().tolist():
                hit = (seen == labels)[labels == label]
                kept = by_class.setdefault(label, [0, 0])
                kept[0] += int(hit.sum())
                kept[1] += len(hit)
        share, mean = wilson(right, total), sum(distances) / len(distances)
        return {
            "samples": total,
            "batches": len(batches),
            "accuracy": round(right / total, 4),
            "accuracy_ci95": _rounded(share.to_list()),
            "distance": round(mean, 4),
            "distance_ci95": _rounded(mean_interval(distances)),
            "by_class": [round(a / b, 4) for _, (a, b) in sorted(by_class.items())],
        }

    def real(self, pictures: Pictures, n: int, batches: int) -> dict[str, Any]:
        """Real pictures, in as many batches as there are pictures for."""
        n = min(n, len(pictures))
        parts = [pictures.part(i * n, (i + 1) * n) for i in range(min(batches, len(pictures) // n))]
        return self.batches([(to_network(part.images), part.labels) for part in parts])

    def sampled(
        self, model: LinaModel, sampling: Sampling, n: int, batches: int, *, bf16: bool = False
    ) -> dict[str, Any]:
        """Samples of every class, ``batches`` times n of them."""
        assert model.config.num_classes is not None
        labels = balanced(n, model.config.num_classes)
        drawn = [(sample(model, labels, FIRST_SEED + i * n, sampling, bf16=bf16), labels) for i in range(batches)]
        return {**settings(sampling), **self.batches(drawn)}


def settings(sampling: Sampling) -> dict[str, Any]:
    return {
        "steps": sampling.num_inference_steps, "flow_steps": sampling.num_diffusion_steps, "guidance": sampling.guidance_scale,
        "min_guidance": sampling.min_guidance_scale,
    }  # fmt: skip


def _rounded(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [round(x, 4) for x in interval]


def copies(model: LinaModel, sampling: Sampling, data: Data, n: int) -> dict[str, Any]:
    """How far the nearest training picture is from samples, and from as many test pictures: root mean square, in grey values of [0, 1]."""
    assert model.config.num_classes is not None
    drawn = sample(model, balanced(n, model.config.num_classes), FIRST_SEED, sampling).clamp(-1, 1)
    train = to_network(data.train.images).flatten(1)
    out: dict[str, Any] = {"samples": n}
    for name, x in (("sampled", drawn), ("real", to_network(data.test.images[:n]))):
        nearest = torch.cdist(x.flatten(1), train, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        out[name] = round(float(nearest.median()) / (2 * math.sqrt(train.shape[1])), 5)
    return out


def sheet(path: Path, model: LinaModel, sampling: Sampling, size: int, shown: int, zoom: int = 2) -> None:
    """A PNG with a row for every class."""
    from foveal.pipelines.emoji.png import write_png

    assert model.config.num_classes is not None
    classes = model.config.num_classes
    labels = torch.arange(classes).repeat_interleave(shown)
    grey = (to_pictures(sample(model, labels, 0, sampling), size) * 255).round().byte().cpu()
    rows = grey.view(classes, shown, size, size).permute(0, 2, 1, 3).reshape(classes * size, shown * size)
    rows = rows.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    write_png(path, rows[..., None].expand(-1, -1, 3).contiguous().numpy())
