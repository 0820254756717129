"""What a study measures beside its samples: teacher-forced step errors, the noise floor, one attention operator, plan files.

Notable choices
- Every result is kept under its own key as soon as it exists, so that a run that was cut off does not repeat it.
- Teacher-forced errors and the noise floor cost extra runs; the config says on how many samples.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foveal.pipelines.contestants import Contestant
from foveal.pipelines.load import others_watched
from foveal.pipelines.measure import WARM_UP, time_operators
from foveal.pipelines.metrics import FunctionMetric, Meta
from foveal.pipelines.metrics.noise_floor import other_exact_backend
from foveal.pipelines.metrics.teacher_forced import follow_trajectory, record_trajectory
from foveal.pipelines.observe import attached, capture_call
from foveal.pipelines.samples import Cell, to_float, to_uint8
from foveal.pipelines.study import Study
from foveal.plugins.method import make
from foveal.plugins.plans import file as plan_file
from foveal.plugins.record import Capture
from foveal.plugins.site import State


# ---- teacher-forced step errors
def steps_key(contestant: Contestant, cell: Cell) -> str:
    return f"steps-{contestant.id}-{cell.name}"


def step_cells(study: Study) -> list[Cell]:
    """The samples that get teacher-forced step errors: spread over prompts first, then seeds."""
    if not any("trajectory" in metric.inputs for metric in study.metrics):
        return []
    by_seed = sorted(study.cells, key=lambda cell: (study.config.seeds.index(cell.seed), cell.prompt))
    return by_seed[: study.config.step_samples]


def measure_steps(study: Study) -> None:
    """Step errors of every sparse method on the first samples, against one dense trajectory each."""
    sparse = [c for c in study.contestants if not c.is_dense]
    todo = [(cell, c) for cell in step_cells(study) for c in sparse if study.store.noted(steps_key(c, cell)) is None]
    cells = list(dict.fromkeys(cell for cell, _ in todo))
    with study.voice.bar("step errors", (len(todo) + len(cells)) * study.generator.steps) as tick:
        for cell in cells:
            sample = partial(study.generator.sample, [study.prompt(cell)], [cell.seed], tick)
            with record_trajectory(*study.generator.networks) as dense:
                sample()
            for contestant in (c for at, c in todo if at == cell):
                with (
                    attached(study.generator, contestant.method),
                    follow_trajectory(dense, *study.generator.networks) as errors,
                ):
                    sample()
                found = errors.by_step(1, study.generator.steps, study.generator.sigmas())
                study.store.note(
                    steps_key(contestant, cell), {name: value[0].tolist() for name, value in found.items()}
                )


def step_errors(study: Study, contestant: Contestant, cell: Cell) -> dict[str, torch.Tensor] | None:
    """The kept step errors of one sample, {"rel_l1" | "cos" | "weight": [1, S]}; those of dense are zero."""
    if contestant.is_dense:
        return None
    kept = study.store.noted(steps_key(contestant, cell))
    return None if kept is None else {name: torch.tensor([value], dtype=torch.float64) for name, value in kept.items()}


# ---- noise floor
def measure_noise_floor(study: Study) -> dict[str, float]:
    """Each fidelity metric of dense against dense with another exact backend, mean over the first samples."""
    usable = [m for m in study.metrics if m.family == "fidelity" and m.inputs == ("reference",)]
    cells = study.cells[: study.config.noise_floor_samples] if usable and study.dense else []
    todo = [cell for cell in cells if study.store.noted(f"floor-{cell.name}") is None]
    with study.voice.bar("noise floor", len(todo) * study.generator.steps) as tick:
        for cell in todo:
            with other_exact_backend() as name:
                clip = study.generator.sample([study.prompt(cell)], [cell.seed], tick)
            values = floor_values(study, cell, clip.frames[0], usable)
            study.store.note(f"floor-{cell.name}", {"backend": name, "values": values})
    kept = [found for cell in cells if (found := study.store.noted(f"floor-{cell.name}"))]
    out: dict[str, float] = {}
    for metric in usable:
        numbers = [k["values"][metric.id] for k in kept if k["values"].get(metric.id) is not None]
        if numbers:
            out[metric.id] = sum(numbers) / len(numbers)
    return out


def floor_values(
    study: Study, cell: Cell, frames: torch.Tensor, metrics: list[FunctionMetric]
) -> dict[str, float | None]:
    """Metrics of one repeated dense sample against the stored one, both in 8 bits."""
    assert study.dense is not None
    again, stored = to_float(to_uint8(frames)), to_float(study.store.load(study.dense.id, cell).video)
    values = {m.id: float(m.per_sample(again, stored, Meta())) for m in metrics}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


# ---- one operator, and the plans
def captured_call(study: Study) -> Capture | None:
    """q, k, v of one layer while the dense model runs on the first sample."""
    cell = study.cells[0]
    return capture_call(study.generator, make("dense"), study.prompt(cell), cell.seed)


def measure_operator(study: Study) -> None:
    """Time one attention call of every method (once per run folder) and keep each method's plan of it."""
    sparse = [c for c in study.contestants if not c.is_dense]
    wants_time = study.config.operator_rounds > 0 and study.store.noted("operator") is None
    wants_plan = [
        c for c in sparse if not plan_path(study, c).is_file() and study.store.noted(f"no-plan-{c.id}") is None
    ]
    if not wants_time and not wants_plan:
        return
    study.voice.say("capturing q, k, v of one attention call")
    call = captured_call(study)
    if call is None:
        return
    for contestant in wants_plan:
        save_plan(study, contestant, call)
    if wants_time:
        methods = {c.id: c.method for c in sparse}
        with (
            study.voice.bar("attention operator", study.config.operator_rounds + WARM_UP) as tick,
            others_watched() as others,
        ):
            found = time_operators(call, methods, study.config.operator_rounds, tick)
        study.store.note(
            "operator", {"call": call_facts(call), "methods": found, "sitting": study.sitting, "others": others.share}
        )


def plan_path(study: Study, contestant: Contestant) -> Path:
    return study.store.folder / "plans" / f"{contestant.id}.safetensors"


def save_plan(study: Study, contestant: Contestant, call: Capture) -> None:
    """The plan a method makes for the captured call, as a file; a method that makes none is noted."""
    plan = contestant.method.plan(call.q, call.k, call.v, call.site, State())
    if plan is None:
        study.store.note(f"no-plan-{contestant.id}", True)
        return
    path = plan_path(study, contestant)
    path.parent.mkdir(parents=True, exist_ok=True)
    site = call.site
    plan_file.save_plan(path, plan, grid=site.grid, visual=site.visual, text=site.text, label=contestant.label)


def call_facts(call: Capture) -> dict[str, Any]:
    """What the record says about a captured call."""
    B, H, N, D = call.q.shape
    return {
        "layer": call.site.layer, "name": call.site.name, "role": call.site.role, "step": call.site.step,
        "grid": list(call.site.grid), "batch": B, "heads": H, "tokens": N, "head_dim": D,
    }  # fmt: skip
