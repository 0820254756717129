"""The summary of a record: a table that pastes into an issue, and a rich table for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveal.plugins.record import Record

if TYPE_CHECKING:
    from rich.console import Group

COLUMNS = ("layer", "role", "kernel", "density", "visited", "share", "calls", "dense")
SHOWN = 4  # layer names listed per reason


@dataclass(frozen=True, eq=False)
class Summary:
    """What ran, read when it is printed. bound of total layers still hold our processor."""

    record: Record
    method: str
    bound: int
    total: int
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """One tuple of strings a layer, in the order of ``COLUMNS``; share is of the whole transformer's time."""
        return [
            (
                row["name"], row["role"], row["implementation"] or "-", _share(row["density"]), _share(row["visited"]),
                _share(row["share"]), str(row["calls"]), str(row["dense_calls"]),
            )
            for row in self.record.table()
        ]  # fmt: skip

    def lines(self) -> list[str]:
        """The sentences under the table: times, plans, what ran dense and why, notes."""
        attention, whole = self.record.attention_seconds(), self.record.transformer_seconds()
        out = []
        if whole:
            out.append(
                f"attention took {attention:.3g} s of {whole:.3g} s in the transformer ({attention / whole:.0%})"
            )
        plans = dict.fromkeys(str(row.facts.plan) for row in self.record.layers if row.facts)
        out += [f"plan: {plan}" for plan in plans]
        for item in self.record.ran_dense_why():
            names = item["layers"]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            times = f"{item['count']} calls" if item["count"] else "left alone"
            out.append(f"dense, {item['reason']}: {times} in {', '.join(names[:SHOWN])}{more}")
        return out + [f"note: {note}" for note in self.notes]

    @property
    def title(self) -> str:
        return f"{self.method} in {self.bound} of {self.total} layers, density {_share(self.record.density())}"

    def __str__(self) -> str:
        rows = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *table, *self.lines()])

    __repr__ = __str__

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(*COLUMNS, title=self.title)
        for row in self.rows():
            table.add_row(*row)
        lines: list[Any] = [Text(line) for line in self.lines()]
        return Group(table, *lines)


def _share(x: float | None) -> str:
    return "-" if x is None or x != x else f"{x:.3f}"
