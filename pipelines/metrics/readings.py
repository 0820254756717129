"""Rates that an exact reader gives: is what the sample shows what the prompt asked for?

B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from foveal.pipelines.metrics.metric import FunctionMetric, Input, Meta

ReadingOf = Callable[[Tensor, Meta], Any]


def accuracies(
    rates: Mapping[str, str],
    world: Input,
    reading_of: ReadingOf,
    score: Callable[[Any, Sequence[Any]], Mapping[str, Tensor]],
    parse: Callable[[str], Any],
) -> tuple[FunctionMetric, ...]:
    """A metric for each rate. rates: summaries by name, as `score` names them; world: whose samples have a reading."""

    def of(name: str) -> Callable[[Tensor, Tensor | None, Meta], Tensor]:
        def function(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
            assert meta.prompts is not None
            return score(reading_of(gen, meta), [parse(prompt) for prompt in meta.prompts])[name]

        return function

    inputs: tuple[Input, ...] = (world, "prompts")
    return tuple(
        FunctionMetric(name, "video", True, of(name), summary, inputs, proportion=True)
        for name, summary in rates.items()
    )
