"""A run folder as values: result.json read once, every field optional, every number finite or None.

Letters: T frames, H height, W width.

* No field is trusted to have its shape. A wrong type reads as "absent"; only a missing or unreadable result.json, or
  one without studies or methods, is an error (`ReportError`).
* A method counts as dense when its name or id is "dense".
* Paths are made from ids only if the id is one plain file name, so that a result.json cannot point outside its folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.pipelines.errors import UserError
from foveal.pipelines.report.words import finite

SCHEMA = 1


class ReportError(UserError):
    """The run folder cannot be reported; one sentence says why and what would help."""


@dataclass(frozen=True)
class Value:
    """A number and, where the run has one, its 95 % interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


@dataclass(frozen=True)
class Metric:
    id: str
    family: str
    value: Value
    n: int | None
    higher_is_better: bool | None
    floor: float | None
    faithful: bool

    @property
    def single_share(self) -> bool:
        """A share taken over one sample: right or wrong, and no share at all."""
        return self.id.startswith("acc_") and self.n is not None and self.n < 2


@dataclass(frozen=True)
class Method:
    """One row of a study. ``index`` numbers the sparse methods from 1; dense is 0."""

    id: str
    label: str
    index: int
    is_dense: bool
    raw: dict[str, Any] = field(repr=False)
    metrics: tuple[Metric, ...] = ()

    @property
    def colour(self) -> int:
        """0 for dense, else 1 to 8, again and again."""
        return 0 if self.is_dense else 1 + (self.index - 1) % 8

    def metric(self, name: str) -> Metric | None:
        return next((m for m in self.metrics if m.id == name), None)

    def value(self, name: str) -> float | None:
        found = self.metric(name)
        return found.value.value if found else None

    def speedup(self, level: str) -> Value:
        """level: "attention", "transformer", "end_to_end", "amdahl_bound" or "amdahl_at_density"."""
        return interval(mapping(mapping(self.raw.get("speed")).get("speedup")).get(level))

    def seconds(self, level: str) -> float | None:
        return finite(mapping(mapping(self.raw.get("speed")).get(level)).get("median_s"))

    def operator(self, key: str) -> float | None:
        """key: "ratio", "efficiency", "median_s"."""
        return finite(mapping(mapping(self.raw.get("speed")).get("operator")).get(key))

    @property
    def density(self) -> float | None:
        found = finite(mapping(self.raw.get("density")).get("mean"))
        return 1.0 if found is None and self.is_dense else found

    @property
    def visited(self) -> float | None:
        return finite(mapping(self.raw.get("density")).get("visited"))

    @property
    def ran_dense(self) -> list[dict[str, Any]]:
        return mappings(self.raw.get("ran_dense"))


@dataclass(frozen=True)
class Study:
    index: int
    title: str
    note: str
    model: dict[str, Any]
    design: dict[str, Any]
    methods: tuple[Method, ...]
    skipped: tuple[dict[str, Any], ...]
    amdahl: dict[str, Any]
    folder: Path
    raw: dict[str, Any] = field(repr=False)

    @property
    def dense(self) -> Method | None:
        return next((m for m in self.methods if m.is_dense), None)

    @property
    def sparse(self) -> tuple[Method, ...]:
        return tuple(m for m in self.methods if not m.is_dense)

    def metric_ids(self) -> list[str]:
        """Every metric that some method has, in order of first appearance."""
        return list(dict.fromkeys(m.id for method in self.methods for m in method.metrics))

    def sample_metric(self, name: str) -> Metric | None:
        return next((m for method in self.methods for m in method.metrics if m.id == name), None)

    @property
    def has_speed(self) -> bool:
        return any(m.speedup("end_to_end").value is not None for m in self.sparse)

    def file(self, kind: str, *names: str) -> Path | None:
        """``<folder>/<kind>/<names...>`` if every name is a plain file name and the path exists."""
        if any(not n or n in (".", "..") or Path(n).name != n or "\\" in n or "\0" in n for n in names):
            return None
        path = self.folder.joinpath(kind, *names)
        return path if path.exists() else None


@dataclass(frozen=True)
class Run:
    folder: Path
    raw: bytes = field(repr=False)
    document: dict[str, Any] = field(repr=False)
    studies: tuple[Study, ...] = ()


# ---- gentle access: a wrong type is an absent value
def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    return [v for v in sequence(value) if isinstance(v, dict)]


def sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def string(value: Any, default: str = "") -> str:
    return value if isinstance(value, str) else default if value is None else str(value)


def interval(value: Any, bounds: Any = None) -> Value:
    """A number, or {"value", "ci95"}, or a number with bounds [low, high] beside it."""
    if isinstance(value, dict):
        bounds, value = value.get("ci95"), value.get("value")
    pair = [finite(b) for b in sequence(bounds)]
    low, high = pair if len(pair) == 2 else (None, None)
    return Value(finite(value), low, high)


# ---- reading
def read_run(folder: Path) -> Run:
    """Read ``folder/result.json``. Raises ``ReportError``."""
    path = folder / "result.json"
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise ReportError(
            f"No readable result.json in {folder}: give the folder of a finished run ({err.strerror})."
        ) from err
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise ReportError(
            f"{path} is not valid JSON ({err}): the run may have been cut off; run it again to finish it."
        ) from err
    if not isinstance(document, dict):
        raise ReportError(f"{path} holds a {type(document).__name__}, an object with schema {SCHEMA} is needed.")
    if document.get("schema", SCHEMA) != SCHEMA:
        raise ReportError(f"{path} has schema {document.get('schema')!r}, this version reads schema {SCHEMA}.")
    studies = mappings(document.get("studies")) or ([document] if mappings(document.get("methods")) else [])
    if not studies:
        raise ReportError(f"{path} lists no studies and no methods: there is nothing to report.")
    read = tuple(_study(i, s, document, folder) for i, s in enumerate(studies))
    if not any(s.methods for s in read):
        raise ReportError(f"{path} has studies without methods: there is nothing to report.")
    return Run(folder, raw, document, read)


def _study(index: int, raw: dict[str, Any], document: dict[str, Any], folder: Path) -> Study:
    model = mapping(raw.get("model")) or mapping(document.get("model"))
    title = string(raw.get("title") or raw.get("id") or model.get("id"), "run")
    return Study(
        index=index,
        title=title,
        note=string(raw.get("note")),
        model=model,
        design=mapping(raw.get("design")) or mapping(document.get("design")),
        methods=_methods(raw),
        skipped=tuple(mappings(raw.get("skipped"))),
        amdahl=mapping(raw.get("amdahl")),
        folder=_study_folder(raw, folder),
        raw=raw,
    )


def _study_folder(raw: dict[str, Any], folder: Path) -> Path:
    """The study's own folder inside the run where it names one ("folder", else its id), else the run's."""
    for key in ("folder", "id"):
        name = string(raw.get(key))
        if name and Path(name).name == name and name not in (".", "..") and (folder / name).is_dir():
            return folder / name
    return folder


def _methods(raw: dict[str, Any]) -> tuple[Method, ...]:
    out, colour = [], 0
    for entry in mappings(raw.get("methods")):
        name = string(entry.get("id") or entry.get("name") or entry.get("label"), "method")
        is_dense = "dense" in (entry.get("id"), entry.get("name"))
        colour += not is_dense
        metrics = tuple(_metric(m) for m in mappings(entry.get("metrics")) if m.get("id"))
        label = string(entry.get("label"), name) or name
        out.append(Method(name, label, 0 if is_dense else colour, is_dense, entry, metrics))
    return tuple(out)


def _metric(raw: dict[str, Any]) -> Metric:
    n, higher = finite(raw.get("n")), raw.get("higher_is_better")
    return Metric(
        id=string(raw.get("id")),
        family=string(raw.get("family"), "other"),
        value=interval(raw.get("value"), raw.get("ci95")),
        n=None if n is None else int(n),
        higher_is_better=higher if isinstance(higher, bool) else None,
        floor=finite(raw.get("noise_floor")),
        faithful=raw.get("faithful") is not False,
    )
