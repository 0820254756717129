"""`foveal compare`: methods x densities x seeds; quality against speed, always with dense, paired by prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foveal.pipelines.config import load
from foveal.pipelines.engine import Outcome, execute
from foveal.pipelines.progress import Voice


def compare(source: str | Path, overrides: Sequence[str] = (), *, voice: Voice | None = None) -> Outcome:
    """Run a config as a comparison: every method once per density in `densities`, and dense.

    A static method takes its nearest setting not above a density; the result states the density that it has.
    Raises UserError in one sentence for whatever is wrong with the input, Interrupted on Ctrl-C.
    """
    return execute(load(source, overrides), verb="compare", voice=voice)
