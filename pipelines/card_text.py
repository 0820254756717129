"""What the cards of all models are written with: rows of a training log, numbers and Markdown tables.

A log is a list of rows, dictionaries with an "event".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def last(rows: Sequence[Row], event: str) -> Row:
    """The last row of an event; an empty one where there is none."""
    return next((row for row in reversed(rows) if row["event"] == event), {})


def show(value: Any) -> str:
    """Four digits, whole numbers in full, words as they are; a dash for what is missing or not a number."""
    if value is None or value != value:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def span(interval: Sequence[float] | None, decimals: int = 3) -> str:
    """An interval; a dash for none."""
    return "-" if interval is None else f"{interval[0]:.{decimals}f} - {interval[1]:.{decimals}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
