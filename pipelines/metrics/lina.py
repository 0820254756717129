"""Whether a picture of a LINA is of the class asked for, in the opinion of the judge that came with the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics.metric import FunctionMetric, Meta


def reading(generator: Any, frames: Tensor) -> list[str]:
    """Names of the classes that a generator's judge sees in frames [B, T, 3, S, S]."""
    return [generator.facts["classes"][i] for i in generator.reading(frames).tolist()]


def _right(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
    if meta.reading is None or meta.prompts is None:
        raise UserError(
            "metric 'acc_class' needs the names of the classes seen, as `reading`, and the names asked for, as `prompts`."
        )
    pairs = zip(meta.reading, meta.prompts, strict=True)
    return gen.new_tensor([float(seen.casefold() == asked.strip().casefold()) for seen, asked in pairs])


METRICS = (
    FunctionMetric(
        "acc_class", "video", True, _right, "the judge that came with the model sees the class asked for", ("lina", "prompts"),
        faithful=False, proportion=True,
    ),
)  # fmt: skip
