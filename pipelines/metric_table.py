"""From finished samples to the metric entries of a result: one number per sample, then means, intervals and paired tests.

P prompts, R seeds.

Notable choices
- Computed from the 8-bit videos on disk, so they can be computed again from the run folder alone.
- Intervals resample prompts; a share of right samples has a Wilson interval; differences to dense are paired by prompt and
  seed, and two shares are compared by McNemar's exact test.
- A number that exists for no sample is not an entry but a line in `skipped`, with the reason.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from foveal.pipelines.contestants import Contestant
from foveal.pipelines.metrics import FunctionMetric, Meta, lina
from foveal.pipelines.probes import step_errors
from foveal.pipelines.samples import Cell, Sample, to_float
from foveal.pipelines.statistics import bootstrap_ci, mcnemar, wilson
from foveal.pipelines.study import Study

Values = dict[str, list[float]]


def values_of(study: Study, contestant: Contestant) -> Values:
    """Every metric of every sample: metric id -> numbers in the order of `study.cells`; NaN where there is none."""
    out: Values = {metric.id: [] for metric in study.metrics}
    for cell in study.cells:
        sample = study.store.load(contestant.id, cell)
        dense = study.store.load(study.dense.id, cell) if study.dense else None
        video, meta = to_float(sample.video), meta_of(study, contestant, cell, sample, dense)
        reference = None if dense is None else to_float(dense.video)
        for metric in study.metrics:
            out[metric.id].append(one_value(metric, contestant, video, reference, meta))
    return out


def one_value(
    metric: FunctionMetric, contestant: Contestant, video: torch.Tensor, reference: torch.Tensor | None, meta: Meta
) -> float:
    """One metric of one sample; NaN for fidelity of dense to itself and for what was not measured."""
    absent = ("trajectory" in metric.inputs and meta.steps is None) or (
        "latents" in metric.inputs and meta.latents is None
    )
    if absent or (metric.family == "fidelity" and contestant.is_dense):
        return math.nan
    return float(metric.per_sample(video, reference, meta)[0])


def meta_of(study: Study, contestant: Contestant, cell: Cell, sample: Sample, dense: Sample | None) -> Meta:
    """What the metrics may know about one sample."""
    reading: Any = None
    if any("world" in metric.inputs for metric in study.metrics):
        from foveal.pipelines.world.reader import read

        reading = read(to_float(sample.video))
    if any("emoji" in metric.inputs for metric in study.metrics):
        from foveal.pipelines.emoji.reader import read as read_emoji

        reading = read_emoji(to_float(sample.video)[:, 0])
    if any("lina" in metric.inputs for metric in study.metrics):
        reading = lina.reading(study.generator, to_float(sample.video))
    latents = None if sample.latents is None else sample.latents[None]
    reference = None if dense is None or dense.latents is None else dense.latents[None]
    return Meta(
        prompts=(study.prompt(cell),),
        latents=latents if reference is not None else None,
        ref_latents=reference,
        tile=tile_pixels(study, contestant, sample),
        steps=step_errors(study, contestant, cell),
        reading=reading,
    )


def tile_pixels(study: Study, contestant: Contestant, sample: Sample) -> tuple[int, int, int] | None:
    """Edge lengths of a method's tile in frames and pixels; None for a method without tiles."""
    grid = grid_of(study)
    order = contestant.method.order(grid) if grid else None
    if grid is None or order is None:
        return None
    T, H, W = sample.video.shape[:3]
    tile = tuple(max(1, round(n * whole / g)) for n, whole, g in zip(order.tile, (T, H, W), grid, strict=True))
    return tile[0], tile[1], tile[2]


def grid_of(study: Study) -> tuple[int, int, int] | None:
    """The token grid: from the model's card, else as the captured attention call saw it."""
    known = study.generator.facts["grid"] or (study.store.noted("operator") or {}).get("call", {}).get("grid")
    return None if known is None else (int(known[0]), int(known[1]), int(known[2]))


def metric_entries(
    study: Study, values: dict[str, Values], contestant: Contestant, floors: dict[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """-> (entries of one method, [{"id", "reason"}] for what it has no number of)."""
    entries, skipped = [], []
    for metric in study.metrics:
        numbers = values[contestant.id][metric.id]
        if all(math.isnan(x) for x in numbers):
            if not (contestant.is_dense and metric.family == "fidelity"):
                skipped.append({"id": metric.id, "reason": f"{contestant.label}: {why_missing(metric)}"})
            continue
        entries.append(metric_entry(study, metric, numbers, floors.get(metric.id)))
        if not contestant.is_dense and study.dense and metric.family != "fidelity":
            entries[-1]["difference"] = difference(study, metric, numbers, values[study.dense.id][metric.id])
    return entries, skipped


def why_missing(metric: FunctionMetric) -> str:
    """Why a metric has no number."""
    if "tile" in metric.inputs:
        return "no tile borders inside the frame"
    if "trajectory" in metric.inputs:
        return "no teacher-forced run (step_samples is 0)"
    if "latents" in metric.inputs:
        return "the pipeline hands out no latents"
    if metric.id == "acc_both":
        return "no prompt names two objects"
    if metric.id == "angle_error":
        return "no prompt names a moving object"
    if metric.id in ("acc_pair", "acc_relation"):
        return "no prompt names two pictures"
    return "a single frame has no motion"


def metric_entry(study: Study, metric: FunctionMetric, numbers: list[float], floor: float | None) -> dict[str, Any]:
    """One entry of result.json."""
    kept = [x for x in numbers if not math.isnan(x)]
    value = sum(kept) / len(kept)
    ci95 = None
    if study.config.intervals and len(study.config.prompts) > 1:
        found = (
            wilson(sum(kept), len(kept)) if metric.proportion else bootstrap_ci(table(study, numbers), seed=study.seed)
        )
        ci95 = found.to_list() if found else None
    return {
        "id": metric.id, "family": metric.family, "value": value, "ci95": ci95, "n": len(kept),
        "higher_is_better": metric.higher_is_better, "noise_floor": floor, "faithful": metric.faithful,
        "settings": metric.settings, "source": "uint8",
        "per_sample": [None if math.isnan(x) else x for x in numbers],
    }  # fmt: skip


def difference(study: Study, metric: FunctionMetric, numbers: list[float], dense: list[float]) -> dict[str, Any]:
    """Method minus dense, paired by prompt and seed."""
    pairs = [(a - b) for a, b in zip(numbers, dense, strict=True)]
    kept = [x for x in pairs if not math.isnan(x)]
    out: dict[str, Any] = {"value": sum(kept) / len(kept) if kept else None, "ci95": None}
    if study.config.intervals and len(study.config.prompts) > 1:
        found = bootstrap_ci(table(study, pairs), seed=study.seed)
        out["ci95"] = found.to_list() if found else None
    if metric.proportion:
        out["mcnemar_p"] = mcnemar(sum(x > 0.5 for x in kept), sum(x < -0.5 for x in kept))
    return out


def table(study: Study, numbers: list[float]) -> list[list[float]]:
    """[cells] -> [P][R]."""
    R = len(study.config.seeds)
    return [numbers[p * R : (p + 1) * R] for p in range(len(study.config.prompts))]
