"""Exact read-outs of the emoji world: what the image shows against what the prompt asked for. No network, no weights.

B samples, images are videos of one frame.

Notable choices
- acc_all and acc_scene carry the names that the procedural world uses; which reader answers depends on the model.
- acc_pair and acc_relation have a value only for prompts that name two pictures.
- An image is read once: whoever computes several of these passes the reading along in `Meta`.
"""

from __future__ import annotations

from torch import Tensor

from foveal.pipelines.emoji.reader import Reading, read, score
from foveal.pipelines.emoji.vocabulary import parse
from foveal.pipelines.metrics.metric import FunctionMetric, Meta
from foveal.pipelines.metrics.readings import accuracies

ACCURACIES = {
    "acc_all": "pictures, relation, scales, style and background as asked for",
    "acc_object": "the pictures asked for and no other",
    "acc_pair": "both pictures, over the prompts that name two",
    "acc_relation": "both pictures and their relation, over the prompts that name two",
    "acc_scale": "the pictures asked for at the scales asked for",
    "acc_scene": "style and background as asked for",
}


def reading_of(gen: Tensor, meta: Meta) -> Reading:
    """The reading that came along, or a new one of [B, 1, 3, S, S]."""
    return meta.reading if meta.reading is not None else read(gen[:, 0])


def _psnr(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
    return reading_of(gen, meta).emoji_psnr


METRICS = (
    FunctionMetric(
        "emoji_psnr", "video", True, _psnr, "how well any scene of the emoji world explains the sample, dB", ("emoji",)
    ),
    *accuracies(ACCURACIES, "emoji", reading_of, score, parse),
)
