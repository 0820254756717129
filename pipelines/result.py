"""The result of a study as plain data: speed, density, metrics, and what stands beside them so that nobody is misled.

L layers, S steps.

Notable choices
- Next to every end-to-end speed-up stands Amdahl's bound: with attention's share a of the dense time, no attention method can
  exceed 1 / (1 - a); at its density d it cannot be expected to exceed 1 / (1 - a + a d).
- Times come from the timed rounds only, never from batches that were made for their pictures.
- `step_spread` and `others_cpu` say how steady and how free the machine was while it timed; `sittings` says in how many
  processes the timed rounds ran: 1 is what a comparison should have.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from foveal.pipelines.contestants import Contestant
from foveal.pipelines.metric_table import Values, metric_entries, values_of
from foveal.pipelines.samples import write_text
from foveal.pipelines.statistics import bootstrap_ratio, median_iqr
from foveal.pipelines.study import Study, round_key

SCHEMA = 1
ROUNDS_FOR_INTERVAL = 5


def study_result(study: Study, floors: dict[str, float], *, folder: str = "") -> dict[str, Any]:
    """The entry of one study in result.json."""
    values: dict[str, Values] = {}
    with study.voice.bar("metrics", len(study.contestants)) as tick:
        for contestant in study.contestants:
            values[contestant.id] = values_of(study, contestant)
            tick()
    share = attention_share(study)
    skipped = [dict(entry) for entry in study.skipped]
    methods = []
    for contestant in study.contestants:
        entries, missing = metric_entries(study, values, contestant, floors)
        skipped += missing
        methods.append({**method_result(study, contestant, share), "metrics": entries})
    out = {
        "id": study.config.id, "title": study.config.title or study.config.model, "note": note(study),
        "model": model_facts(study), "design": design(study), "methods": methods, "skipped": skipped,
        "amdahl": {"attention_share": share, "bound": bound(share)},
        "pareto": {"x": "speedup.end_to_end" if study.config.rounds else "density", "y": pareto_metric(study)},
    }  # fmt: skip
    return {**out, "folder": folder} if folder else out


def note(study: Study) -> str:
    """The study's own note after the model's: a toy's numbers never stand alone."""
    return " ".join(part for part in (sentence(study.generator.facts["note"]), study.config.note) if part)


def sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if not text or text.endswith(".") else ".")


def pareto_metric(study: Study) -> str | None:
    """The first fidelity metric, else the first metric."""
    ids = [m.id for m in study.metrics if m.family == "fidelity"] + [m.id for m in study.metrics]
    return ids[0] if ids else None


def model_facts(study: Study) -> dict[str, Any]:
    """The model's facts, those of a diffusers checkpoint completed by what the captured call saw."""
    facts = dict(study.generator.facts)
    call = (study.store.noted("operator") or {}).get("call", {})
    for name in ("grid", "tokens", "heads", "head_dim"):
        if facts.get(name) is None:
            facts[name] = call.get(name)
    return facts


def design(study: Study) -> dict[str, Any]:
    """Prompts, seeds and the choices that make the comparison fair."""
    steps = {json.dumps(c.method.dense_steps) for c in study.contestants if not c.is_dense}
    rounds = timed(study, study.contestants)
    return {
        "prompts": list(study.config.prompts), "seeds": list(study.config.seeds), "base_seed": study.config.seeds[0],
        "dense_steps": json.loads(next(iter(steps))) if len(steps) == 1 else sorted(steps) or 0,
        "paired": True, "rounds": study.config.rounds, "interleaved": True, "batch": study.config.batch,
        "metrics": [metric.id for metric in study.metrics],
        "sittings": len({r["sitting"] for r in rounds}) if rounds else None,
        "step_spread": step_spread(study), "others_cpu": others_share(study, rounds),
    }  # fmt: skip


def others_share(study: Study, rounds: list[dict[str, Any]]) -> float | None:
    """The largest share of the processors that other programs used while something was timed."""
    seen = [r["others"] for r in rounds] + [(study.store.noted("operator") or {}).get("others")]
    return max((x for x in seen if x is not None), default=None)


def step_spread(study: Study) -> float | None:
    """Quartile range over median of the dense network's step times, which all do the same work: how steady the machine was."""
    rounds = timed(study, [study.dense]) if study.dense else []
    found = median_iqr([s for r in rounds for s in r["record"]["transformer_by_step"]])
    return (found["iqr"][1] - found["iqr"][0]) / found["median_s"] if found["median_s"] else None


# ---- one method
def timed(study: Study, contestants: Any) -> list[dict[str, Any]]:
    """The kept timed rounds of some methods."""
    keys = [round_key(c, r) for c in contestants for r in range(study.config.rounds)]
    return [found for key in keys if (found := study.store.noted(key)) is not None]


def record_of(study: Study, contestant: Contestant) -> dict[str, Any]:
    """The record of the first timed round, else of the first sample."""
    rounds = timed(study, [contestant])
    return rounds[0]["record"] if rounds else study.store.load(contestant.id, study.cells[0]).facts["record"]


def method_result(study: Study, contestant: Contestant, share: float | None) -> dict[str, Any]:
    """Everything about one method but its metrics."""
    record = record_of(study, contestant)
    density = 1.0 if record["density"] is None and contestant.is_dense else record["density"]
    out = {
        "id": contestant.id, "name": contestant.name, "label": contestant.label, "config": contestant.config(),
        "summary": type(contestant.method).summary,
        "density": {
            "mean": density, "visited": record["visited"], "per_layer": record["per_layer"],
            "by_layer_step": record["density_grid"],
        },
        "implementation": record["implementation"],
        "ran_dense": [] if contestant.is_dense else record["ran_dense"],
        "layers": record["layers"],
    }  # fmt: skip
    speed = speed_entry(study, contestant, density, share)
    if speed:
        out["speed"] = speed
    if study.config.rounds:
        out["time_by_layer_step"] = record["seconds"]
    return out


def speed_entry(study: Study, contestant: Contestant, density: float | None, share: float | None) -> dict[str, Any]:
    """Times and speed-ups of one method; empty when the study times nothing."""
    out: dict[str, Any] = {}
    operator = (study.store.noted("operator") or {}).get("methods", {}).get(contestant.id)
    if operator:
        out["operator"] = operator
    rounds = timed(study, [contestant])
    if not rounds:
        return out
    out["attention"] = median_iqr([r["record"]["attention_s"] for r in rounds])
    steps = [s for r in rounds for s in r["record"]["transformer_by_step"]]
    out["transformer"] = {**median_iqr([r["record"]["transformer_s"] for r in rounds]), "step": median_iqr(steps)}
    out["end_to_end"] = median_iqr([r["seconds"] for r in rounds])
    out["speedup"] = speedups(study, rounds, density, share)
    return out


def speedups(study: Study, rounds: list[dict[str, Any]], density: float | None, share: float | None) -> dict[str, Any]:
    """Dense time over this time at three depths, with intervals over rounds where there are enough, and the bounds."""
    baseline = timed(study, [study.dense]) if study.dense else []
    out: dict[str, Any] = {
        "amdahl_bound": bound(share),
        "amdahl_at_density": None if share is None or density is None else 1 / (1 - share + share * density),
    }
    depths = {
        "attention": lambda r: r["record"]["attention_s"],
        "transformer": lambda r: r["record"]["transformer_s"],
        "end_to_end": lambda r: r["seconds"],
    }
    for name, read in depths.items():
        dense, ours = [read(r) for r in baseline], [read(r) for r in rounds]
        if not dense or not ours or not median_iqr(ours)["median_s"]:
            continue
        out[name] = median_iqr(dense)["median_s"] / median_iqr(ours)["median_s"]
        if len(dense) == len(ours) >= ROUNDS_FOR_INTERVAL:
            found = bootstrap_ratio(dense, ours, seed=study.seed)
            out[name] = {"value": out[name], "ci95": found.to_list() if found else None}
    return out


# ---- Amdahl
def attention_share(study: Study) -> float | None:
    """Attention's share of the dense end-to-end time; None when nothing was timed."""
    rounds = timed(study, [study.dense]) if study.dense else []
    whole = median_iqr([r["seconds"] for r in rounds])["median_s"]
    attention = median_iqr([r["record"]["attention_s"] for r in rounds])["median_s"]
    return None if not whole else min(1.0, attention / whole)


def bound(share: float | None) -> float | None:
    """1 / (1 - share): the most that attention methods can give end to end."""
    return None if share is None or share >= 1 else 1 / (1 - share)


# ---- files
def finite(value: Any) -> Any:
    """NaN and infinities as None, so that the file is JSON for everyone."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_result(folder: Path, document: dict[str, Any]) -> Path:
    """Write result.json, whole or not at all."""
    path = folder / "result.json"
    write_text(path, json.dumps(finite(document), indent=1, allow_nan=False) + "\n")
    return path
