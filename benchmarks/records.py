"""Reading ``benchmarks/results``: records by name, the line that says where their figures come from, and markdown tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
Record = dict[str, Any]


def record_of(name: str, results: Path | None = None) -> Record | None:
    """The record of a bench, or None where it was not measured."""
    path = (results or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def on_gpu(record: Record | None) -> Record | None:
    """The record if a GPU made it: what a CPU measures says nothing about the kernels."""
    return None if record is None or "cpu" in record["device"].lower() else record


def source(record: Record) -> str:
    """Device, versions, date and command on one line."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if name != "foveal")
    return f"{record['device']}, {versions}, {record['date']}; `{record['command']}`"


def head(record: Record) -> str:
    """The line above a table."""
    device, rest = source(record).split("; ", 1)
    note = f" {record['note']}" if "note" in record else ""  # what a reader must know before the figures
    return f"{device}, median of at least {record['rounds']} interleaved rounds; {rest}.{note}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([text[0], "|" + "---|" * len(columns), *text[1:]])


def shape(row: Record) -> str:
    """Tokens x heads x head dim; of a block, its visual tokens."""
    size = row["shape"]
    return f"{size['tokens']:,} x {size['heads']} x {size['head_dim']}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms"
