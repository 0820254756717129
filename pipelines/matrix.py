"""`foveal doctor --matrix` and docs/composition.md: what composes with an accelerated model, told from the host's own data.

``python -m foveal.pipelines.matrix`` writes the page anew.

Notable choices
- One line per condition names hosts by outcome; reasons are numbered sentences below it. The page adds every host's own line.
- Nothing is run and no host library is imported: the tests run the cells, this only tells what they found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.plugins.diffusers_host.composition import (
    CONDITIONS,
    HOSTS,
    NAMES,
    ORDERS,
    Condition,
    Verdict,
    cells,
    verdict,
)

PAGE = Path("docs/composition.md")
COLUMNS = ("condition", "works", "refuses", "not applicable", "not tried here")
OTHER = ("needs a GPU", "not tried")  # share the last column
MARKS = {"works": "yes", "refuses": "**no**", "not applicable": "", "needs a GPU": "GPU", "not tried": "?"}


def matrix_rows() -> list[dict[str, Any]]:
    """Every cell as plain data."""
    return [
        {"host": host, "condition": condition, "order": order, "outcome": found.outcome, "reason": found.reason}
        for host, condition, order, found in cells()
    ]


# ---- one line per condition
class Reasons:
    """Sentences, numbered as they come up."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def mark(self, sentence: str) -> str:
        if not sentence:
            return ""
        if sentence not in self.sentences:
            self.sentences.append(sentence)
        return f" [{self.sentences.index(sentence) + 1}]"


def condition_lines(reasons: Reasons) -> list[list[str]]:
    """Cells of the table, one line per condition."""
    return [
        [condition.name, *(told(condition, outcomes, reasons) for outcomes in columns())] for condition in CONDITIONS
    ]


def columns() -> tuple[tuple[str, ...], ...]:
    return ("works",), ("refuses",), ("not applicable",), OTHER


def told(condition: Condition, outcomes: tuple[str, ...], reasons: Reasons) -> str:
    """Hosts with one of these outcomes, by reason and, where it matters, by order: "sd3, pixart (after) [2]; ltx"."""
    groups: dict[Verdict, dict[str, list[str]]] = {}
    for host in NAMES:
        for order in ORDERS:
            found = verdict(host, condition.name, order)
            if found.outcome in outcomes:
                groups.setdefault(found, {}).setdefault(order, []).append(host)
    parts = []
    for found, by_order in groups.items():
        same = len(by_order) == len(ORDERS) and len({tuple(hosts) for hosts in by_order.values()}) == 1
        said = (
            {"": next(iter(by_order.values()))} if same else {f" ({order})": hosts for order, hosts in by_order.items()}
        )
        parts += [f"{hosts_of(hosts)}{order}{reasons.mark(found.reason)}" for order, hosts in said.items()]
    return "; ".join(parts)


def hosts_of(hosts: list[str]) -> str:
    """Names, or what is missing from all, whichever is shorter."""
    missing = [name for name in NAMES if name not in hosts]
    if not missing:
        return "all"
    return ", ".join(hosts) if len(hosts) <= len(missing) else f"all but {', '.join(missing)}"


def print_matrix(console: Console) -> None:
    """The table and its sentences."""
    reasons, table = Reasons(), Table(box=box.MARKDOWN)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for line in condition_lines(reasons):
        table.add_row(*(Text(cell) for cell in line))
    console.print(table)
    console.print()
    for number, sentence in enumerate(reasons.sentences, 1):
        console.print(f"[{number}] {sentence}", markup=False)


# ---- the page
INTRO = """# What composes with it

`foveal doctor --matrix` prints the first table; `--json` gives every cell. Both, this page and the host's own refusals come from
one place, `plugins/diffusers_host/composition.py`, and `make test-matrix` runs every cell on tiny random pipelines on a CPU, with three
methods (`dense`, `grat`, `neighborhood`) and the condition turned on before and after `foveal.accelerate`.

- **works**: dense settings give what the condition alone gives to the bit (HunyuanVideo 1.5: within 1e-5 of the largest value, because
  its attention is restated without padding), sparse settings run sparse in every layer that runs, and `remove()` gives the condition
  alone back to the bit.
- **refuses**: an error of one sentence, or a warning and a line of the summary. Never silently dense.
- **not applicable**: diffusers itself has no such thing for the pipeline, or stops without foveal too.
- (before), (after): when the condition is turned on, where that makes a difference.
"""


def page() -> str:
    """docs/composition.md."""
    reasons = Reasons()
    lines = condition_lines(reasons)
    numbered = [f"{number}. {sentence}" for number, sentence in enumerate(reasons.sentences, 1)]
    how = [[c.name, f"`{c.how}`" if "(" in c.how else c.how, c.note] for c in CONDITIONS]
    every = [[host, *(mark(host, c.name) for c in CONDITIONS)] for host in NAMES]
    parts = [
        INTRO, markdown(COLUMNS, lines), "\n".join(numbered),
        "## What was turned on", markdown(("condition", "how", "note"), how),
        "## Host by host", "before / after, where they differ; empty: not applicable.",
        markdown(("", *(c.name for c in CONDITIONS)), every),
        "## Hosts", markdown(("host", "pipeline", "models"), [[h.name, h.pipeline, h.models] for h in HOSTS]),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts) + "\n"


def mark(host: str, condition: str) -> str:
    marks = [MARKS[verdict(host, condition, order).outcome] for order in ORDERS]
    return marks[0] if marks[0] == marks[1] else " / ".join(m or "–" for m in marks)


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page(), encoding="utf-8")
    print(target)
