"""One sampling run with a method attached, and what the host's record says about it.

L attention layers that ran, S steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from foveal.pipelines.errors import UserError
from foveal.pipelines.generator import Clip, Generator, OnStep
from foveal.pipelines.host_info import synchronize
from foveal.pipelines.load import others_watched
from foveal.plugins.method import Method, MethodError
from foveal.plugins.record import Capture, Record

DIGITS = 6


def observe(
    generator: Generator,
    method: Method,
    prompts: Sequence[str],
    seeds: Sequence[int],
    on_step: OnStep | None = None,
    steps: int | None = None,
    waited: Callable[[], float] = lambda: 0.0,
) -> tuple[Clip, dict[str, Any]]:
    """Sample with the method and without changing the pipeline for whoever comes next.

    -> (clip, {"seconds": per sample, "record": summary, "others": processor share of other programs}); times cover the whole call, loading and saving excluded, and so is
    the time that `waited` reports (a run in turn with others).
    """
    with attached(generator, method) as handle:
        synchronize(generator.device)
        start = time.perf_counter()
        with others_watched() as others:
            clip = generator.sample(prompts, seeds, on_step, steps)
            synchronize(generator.device)
        seconds = time.perf_counter() - start - waited()
        return clip, {"seconds": seconds / len(prompts), "record": summary(handle.record), "others": others.share}


def attached(generator: Generator, method: Method) -> Any:
    """A handle (a context manager) on the generator's pipeline; a method that does not fit is a UserError."""
    try:
        return generator.attach(method)
    except MethodError as err:
        raise UserError(f"{method.label}: {err}") from err


def capture_call(generator: Generator, dense: Method, prompt: str, seed: int) -> Capture | None:
    """q, k, v of the middle layer at the second of two steps (the first of one), with its site; None if no layer is bound."""
    steps = min(2, generator.steps)
    with attached(generator, dense) as handle:
        layers = [row.layer for row in handle.record.layers if row.left_alone is None]
        if not layers:
            return None
        handle.record.capture = [(sorted(layers)[len(layers) // 2], steps - 1)]
        generator.sample([prompt], [seed], steps=steps)
        return handle.record.captured[0] if handle.record.captured else None


def summary(record: Record) -> dict[str, Any]:
    """The part of a record that a result keeps: layers that ran, grids [L, S] of seconds and densities, reasons for dense."""
    full = record.to_dict()
    kept = [i for i, row in enumerate(full["layers"]) if row["calls"]]
    names = [full["layers"][i]["name"] for i in kept]
    grids = full["by_layer_step"]
    return {
        "layers": names,
        "seconds": rounded([grids["seconds"][i] for i in kept]),
        "density_grid": rounded([grids["density"][i] for i in kept]),
        "density": full["density"],
        "visited": full["visited"],
        "per_layer": rounded([full["layers"][i]["density"] for i in kept]),
        "attention_s": full["attention_seconds"],
        "transformer_s": full["transformer_seconds"],
        "transformer_by_step": rounded(full["transformer_by_step"]),
        "implementation": ", ".join(full["implementations"]) or "sdpa",
        "ran_dense": [
            {**entry, "layers": [names.index(n) for n in entry["layers"] if n in names]}
            for entry in full["ran_dense"]
            if entry["count"]
        ],
        "notes": full["notes"],
    }


def rounded(value: Any) -> Any:
    """Numbers to six digits, nested lists kept."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
