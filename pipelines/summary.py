"""A result as tables for a terminal: Markdown, so that they paste into an issue.

Notable choices
- Speed stands with its bound, fidelity and quality in separate columns, intervals in brackets.
- Words and number formats are those of the report.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.pipelines.report.glossary import term
from foveal.pipelines.report.words import percent, ratio, significant

DASH = "–"
WIDTH = 200  # wide enough for any table; text is wrapped by the terminal
MOST_METRICS = 5
UNSTEADY, BUSY = 0.15, 0.1


def print_outcome(document: dict[str, Any], console: Console) -> None:
    """Every study of a result as a table with what must stand beside it."""
    for study in document["studies"]:
        model = study["model"]
        toy = " (toy model)" if model.get("toy") else ""
        lines(console, "", f"### {study['title']}", f"{model['id']}{toy}: {described(study)}")
        console.print(study_table(study))
        lines(console, *(f"- {line}" for line in footnotes(study)))
    for failed in document.get("failed", []):
        lines(console, "", f"Study {failed['id']} did not run: {failed['reason']}")


def lines(console: Console, *texts: str) -> None:
    """Plain lines, wrapped by the terminal and not by us."""
    for text in texts:
        console.print(text, markup=False, soft_wrap=True)


def described(study: dict[str, Any]) -> str:
    """Size and design in one line."""
    model, design = study["model"], study["design"]
    tokens = f"{model['tokens']:,} tokens, " if model.get("tokens") else ""
    cells = f"{len(design['prompts'])} prompt(s) x {len(design['seeds'])} seed(s)"
    dense = design.get("dense_steps")
    steps = f", dense steps {dense}" if dense else ", no dense steps"
    return f"{tokens}{model['steps']} steps, guidance {model['guidance']:g}, {model['dtype']}, {cells}{steps}"


def study_table(study: dict[str, Any]) -> Table:
    """One row a method."""
    table = Table(box=box.MARKDOWN, show_edge=True, pad_edge=True)
    speed = any("speedup" in m.get("speed", {}) for m in study["methods"])
    operator = any("operator" in m.get("speed", {}) for m in study["methods"])
    metrics = metric_ids(study)
    heads = ["method", "density"]
    heads += ["seconds", "end to end", "bound"] if speed else []
    heads += ["operator", "eff"] if operator else []
    for head in [*heads, *(head_of(study, name) for name in metrics)]:
        table.add_column(Text(head), justify="left" if head == "method" else "right", no_wrap=True)
    for method in study["methods"]:
        row = [method["label"], percent(method["density"]["mean"], 1)]
        row += speed_cells(method) if speed else []
        row += operator_cells(method) if operator else []
        row += [metric_cell(method, name) for name in metrics]
        table.add_row(*map(Text, row))
    return table


def metric_ids(study: dict[str, Any]) -> list[str]:
    """The first metrics of the config that have numbers, at most a handful, fidelity before quality."""
    design = study["design"].get("metrics", [])
    found = {entry["id"]: entry["family"] for method in study["methods"] for entry in method["metrics"]}
    order = [name for name in design if name in found] + [name for name in found if name not in design]
    return sorted(order[:MOST_METRICS], key=lambda name: found[name] != "fidelity")


def head_of(study: dict[str, Any], name: str) -> str:
    """Column header of a metric, with unit, direction, and a mark for a stand-in."""
    entry = next(e for m in study["methods"] for e in m["metrics"] if e["id"] == name)
    known = term(name, entry["higher_is_better"])
    unit = f" {known.unit}" if known.unit else ""
    return f"{known.head}{unit}{'' if entry['faithful'] else '†'} {'↑' if entry['higher_is_better'] else '↓'}"


def speed_cells(method: dict[str, Any]) -> list[str]:
    speed = method.get("speed", {})
    up = speed.get("speedup", {})
    if method["name"] == "dense":
        return [significant(speed.get("end_to_end", {}).get("median_s")), "1.00×", DASH]
    return [
        significant(speed.get("end_to_end", {}).get("median_s")),
        ratio(number(up.get("end_to_end"))),
        ratio(up.get("amdahl_at_density")),
    ]


def operator_cells(method: dict[str, Any]) -> list[str]:
    operator = method.get("speed", {}).get("operator", {})
    efficiency = operator.get("efficiency") if method["name"] != "dense" else None
    return [ratio(operator.get("ratio")), significant(efficiency, 2)]


def metric_cell(method: dict[str, Any], name: str) -> str:
    entry = next((e for e in method["metrics"] if e["id"] == name), None)
    if entry is None:
        return DASH
    write = term(name).write
    interval = entry.get("ci95")
    text = write(entry["value"])
    return f"{text} [{write(interval[0])}, {write(interval[1])}]" if interval else text


def number(value: Any) -> float | None:
    """A speed-up that is a number or {"value", "ci95"}."""
    return value.get("value") if isinstance(value, dict) else value


def footnotes(study: dict[str, Any]) -> list[str]:
    """The sentences a table must not go without."""
    found = [
        unsteady_sentence(study),
        bound_sentence(study),
        operator_sentence(study),
        floor_sentence(study),
        study["note"],
    ]
    found += [f"Not computed: {entry['id']} ({entry['reason']})." for entry in study["skipped"]]
    return [sentence for sentence in found if sentence]


def unsteady_sentence(study: dict[str, Any]) -> str:
    spread, others = study["design"].get("step_spread") or 0.0, study["design"].get("others_cpu") or 0.0
    if spread <= UNSTEADY and others <= BUSY:
        return ""
    return (
        f"The machine was busy: other programs took up to {percent(others)} of the processors, and dense steps, all equal work, "
        f"differ by {percent(spread)} (quartiles). Repeat on a quiet machine before you quote times."
    )


def bound_sentence(study: dict[str, Any]) -> str:
    share, bound = study["amdahl"].get("attention_share"), study["amdahl"].get("bound")
    if share is None or bound is None:
        return ""
    return (
        f"Attention takes {percent(share)} of dense time here: free attention would give {ratio(bound)} end to end (Amdahl). "
        "`bound` is that limit for attention that costs its density."
    )


def operator_sentence(study: dict[str, Any]) -> str:
    found = [m["speed"]["operator"]["baseline"] for m in study["methods"] if "operator" in m.get("speed", {})]
    if not found:
        return ""
    return f"`operator`: one attention call with order, plan, kernel and inverse, against {found[0]}; `eff` is its ratio x density."


def floor_sentence(study: dict[str, Any]) -> str:
    floors = {e["id"]: e["noise_floor"] for m in study["methods"] for e in m["metrics"] if e["noise_floor"] is not None}
    text = ", ".join(f"{term(k).head} {term(k).write(v)}" for k, v in floors.items())
    return f"Noise floor, dense against dense with another exact kernel: {text}." if floors else ""
