"""The methods of a study, made from its config: ids for files, labels for eyes, dense first.

Notable choices
- Dense is added where a fidelity metric or a speed-up needs it, and always stands first.
- A sweep makes one contestant per density; a method whose knobs fix the density already runs once.
- All contestants of a study have the same dense steps unless the config says otherwise, in words, for one of them; the
  study's record states them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics import FunctionMetric
from foveal.pipelines.schema import MethodConfig, StudyConfig
from foveal.plugins.method import Method, MethodError, make


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison. id is a plain file name."""

    id: str
    label: str
    method: Method

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def is_dense(self) -> bool:
        return self.method.name == "dense"

    def config(self) -> dict[str, Any]:
        """Name and knobs as plain data; `foveal.plugins.method.make` takes them back."""
        return {"name": self.name, "knobs": self.method.knobs()}


def contestants(study: StudyConfig, metrics: Sequence[FunctionMetric], *, sweep: bool = False) -> list[Contestant]:
    """The methods of a study in order, with dense first where it is needed.

    sweep: one contestant per density of `study.densities` for each method that does not fix its own.
    Raises UserError that names the key, for an unknown method or knob.
    """
    made: list[tuple[str, Method]] = []
    for i, entry in enumerate(study.methods):
        for density in densities_of(entry, study.densities if sweep else []):
            made.append(build(entry, i, density))
    if needs_dense(study, metrics, sweep) and not any(method.name == "dense" for _, method in made):
        made.insert(0, ("dense", make("dense")))
    made.sort(key=lambda pair: pair[1].name != "dense")
    if sum(method.name == "dense" for _, method in made) > 1:
        raise UserError("methods lists dense more than once; the comparison has one dense run.")
    return name_apart(made)


def needs_dense(study: StudyConfig, metrics: Sequence[FunctionMetric], sweep: bool) -> bool:
    """Whether the study compares with dense: fidelity metrics, speed-ups, or a sweep."""
    fidelity = any(metric.family == "fidelity" for metric in metrics)
    return sweep or fidelity or study.rounds > 0 or study.operator_rounds > 0


def densities_of(entry: MethodConfig, densities: Sequence[float]) -> list[float | None]:
    """The densities a method runs at; [None] when its knobs say it all."""
    if entry.name == "dense" or not densities or "density" in entry.knobs:
        return [None]
    return list(densities)


def build(entry: MethodConfig, index: int, density: float | None) -> tuple[str, Method]:
    """(label, method) of one config entry."""
    knobs = dict(entry.knobs) if density is None else {**entry.knobs, "density": density}
    try:
        method = make(entry.name, **knobs)
    except (MethodError, TypeError, ValueError) as err:
        raise UserError(f"methods[{index}]: {' '.join(str(err).split())}") from err
    label = entry.label or method.label
    return (label if density is None else f"{label} at {density:g}"), method


def name_apart(made: Sequence[tuple[str, Method]]) -> list[Contestant]:
    """Give every method an id that is a plain file name and no other's."""
    out: list[Contestant] = []
    taken: set[str] = set()
    for label, method in made:
        stem = "dense" if method.name == "dense" else slug(label)
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        out.append(Contestant(name, label, method))
    return out


def slug(text: str) -> str:
    """A plain file name: "GRAT-B b=1" -> "grat-b-b-1"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] or "method"
