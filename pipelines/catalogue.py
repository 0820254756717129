"""What `foveal methods` lists: registered methods with their knobs, and metrics with what they need."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.pipelines.metrics import metrics
from foveal.plugins.method import Method, method_class, methods

COMMON = tuple(field.name for field in dataclasses.fields(Method))


def method_rows(name: str | None = None) -> list[dict[str, Any]]:
    """Every registered method (or one): name, summary, where it comes from, knobs with defaults, documentation."""
    found = methods() if name is None else {name: method_class(name)}
    return [method_row(key, cls) for key, cls in sorted(found.items(), key=lambda pair: (pair[0] != "dense", pair[0]))]


def method_row(name: str, cls: type[Method]) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {
        "name": name, "summary": cls.summary, "package": cls.__module__.split(".")[0], "roles": list(cls.roles),
        "knobs": {f.name: default_of(f) for f in fields if f.name not in COMMON},
        "common_knobs": {f.name: default_of(f) for f in fields if f.name in COMMON},
        "documentation": inspect.getdoc(cls) or "",
    }  # fmt: skip


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A knob's default as plain data."""
    if field.default is not dataclasses.MISSING:
        return list(field.default) if isinstance(field.default, tuple) else field.default
    return None if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def metric_rows() -> list[dict[str, Any]]:
    """Every metric: id, family, direction, what it needs beside the video, whether the official name is earned."""
    return [
        {
            "id": m.id, "family": m.family, "higher_is_better": m.higher_is_better, "inputs": list(m.inputs),
            "weights": [spec.filename for spec in m.needs], "faithful": m.faithful, "summary": m.summary,
        }
        for m in metrics().values()
    ]  # fmt: skip


def print_methods(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a method; a single method with its documentation."""
    table = Table(box=box.MARKDOWN)
    for head in ("method", "knobs = defaults", "what it does"):
        table.add_column(head, no_wrap=head == "method")
    for row in rows:
        own = row["package"] == "foveal"
        knobs = ", ".join(f"{key}={value}" for key, value in row["knobs"].items()) or "none"
        table.add_row(*map(Text, (row["name"], knobs, row["summary"] + ("" if own else f" (from {row['package']})"))))
    console.print(table)
    common = ", ".join(f"{key}={value}" for key, value in rows[0]["common_knobs"].items()) if rows else ""
    console.print(f"\nCommon to all: {common}.", markup=False)
    if len(rows) == 1:
        console.print("\n" + rows[0]["documentation"], markup=False)
    else:
        console.print("`foveal methods NAME` tells what each knob does.", markup=False)


def print_metrics(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a metric."""
    table = Table(box=box.MARKDOWN)
    for head in ("metric", "family", "better", "needs", "what it says"):
        table.add_column(head, no_wrap=head in ("metric", "family"))
    for row in rows:
        needs = ", ".join([*row["inputs"], *row["weights"]]) or "nothing"
        name = row["id"] if row["faithful"] else f"{row['id']} †"
        better = "higher" if row["higher_is_better"] else "lower"
        table.add_row(*map(Text, (name, row["family"], better, needs, row["summary"])))
    console.print(table)
    console.print("\n† a stand-in of ours, not an official metric.", markup=False)
