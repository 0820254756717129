"""The summary table: one row a method, column groups for work, speed, fidelity to dense and quality.

* Every cell carries its plain number in ``data-v``; the script sorts by it, without the script the table just stands.
* Fidelity (did the acceleration change the output?) and quality (is it still a good video?) are never mixed.
* Columns nobody has are left out; a value one method lacks is a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.pipelines.report.glossary import term
from foveal.pipelines.report.source import Method, Metric, Study, finite, sequence, string
from foveal.pipelines.report.words import DASH, NBSP, esc, listed, percent, plural, ratio, significant

FIDELITY_FIRST = ("psnr", "ssim", "step_rel_l1", "tdiff_psnr")
QUALITY_FIRST = ("world_psnr", "emoji_psnr", "jitter", "acc_all")
IN_TABLE = {"fidelity": 4, "quality": 3}


@dataclass(frozen=True)
class Cell:
    text: str
    sort: float | str | None
    small: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    group: str
    head: str
    title: str
    cells: tuple[Cell, ...]
    foot: str = ""
    kind: str = "number"


def metric_groups(study: Study) -> dict[str, list[str]]:
    """Metric ids by group, the best known first. Everything that is not fidelity or attention error is quality."""
    groups: dict[str, list[str]] = {"fidelity": [], "quality": []}
    for name in study.metric_ids():
        sample = study.sample_metric(name)
        family = sample.family if sample else ""
        groups["fidelity" if family in ("fidelity", "attention") else "quality"].append(name)
    for group, first in (("fidelity", FIDELITY_FIRST), ("quality", QUALITY_FIRST)):
        known = [i for i in first if i in groups[group]]
        groups[group] = known + [i for i in groups[group] if i not in known]
    return groups


def swatch(method: Method) -> str:
    return f'<i class="swatch c{method.colour}" aria-hidden="true"></i>'


# ---- columns
def _work(study: Study) -> list[Column]:
    cells = []
    for m in study.methods:
        small = f"visited {percent(m.visited)}" if m.visited is not None else ""
        cells.append(Cell(percent(m.density), m.density, small, m.density))
    return [Column("Work", "Density", "pairs attended / all pairs", tuple(cells))]


def _speed(study: Study) -> list[Column]:
    if not study.has_speed and not any(m.operator("ratio") for m in study.sparse):
        return []
    out = []
    for level, head in (("end_to_end", "End to end"), ("transformer", "Transformer")):
        cells = [_speed_cell(m, level) for m in study.methods]
        if any(c.sort is not None for c in cells):
            out.append(Column("Speed-up over dense", head, f"dense time / this time, {head.lower()}", tuple(cells)))
    cells = [_operator_cell(m) for m in study.methods]
    if any(c.sort is not None for c in cells):
        out.append(
            Column("Speed-up over dense", "Operator", "one attention operator: dense time / this time", tuple(cells))
        )
    return out


def _speed_cell(m: Method, level: str) -> Cell:
    up, bound = m.speedup(level), m.speedup("amdahl_bound").value if level == "end_to_end" else None
    value = 1.0 if up.value is None and m.is_dense else up.value
    small = [f"[{ratio(up.low)}, {ratio(up.high)}]"] if up.has_interval else []
    if m.is_dense:
        return Cell(ratio(value), value, "baseline" if level == "end_to_end" else "")
    if bound is not None:
        small.append(f"bound{NBSP}{ratio(bound)}")
        at_density = m.speedup("amdahl_at_density").value
        small += [f"at density{NBSP}{ratio(at_density)}"] if at_density is not None else []
    gained = (value - 1) / (bound - 1) if value is not None and bound is not None and bound > 1 else None
    return Cell(ratio(value), value, "\n".join(small), gained)


def _operator_cell(m: Method) -> Cell:
    value, eff = m.operator("ratio"), m.operator("efficiency")
    if value is None:
        value = 1.0 if m.is_dense else m.speedup("attention").value
    if eff is None and value is not None and m.density is not None and not m.is_dense:
        eff = value * m.density
    return Cell(ratio(value), value, f"eff {significant(eff, 2)}" if eff is not None and not m.is_dense else "")


def _metric_column(study: Study, name: str, group: str) -> Column:
    t = term(name, getattr(study.sample_metric(name), "higher_is_better", None))
    cells, floors, stand_in = [], [], False
    for m in study.methods:
        found = m.metric(name)
        cells.append(_metric_cell(found, m, group, t.write))
        if found is not None:
            floors += [found.floor] if found.floor is not None else []
            stand_in = stand_in or not found.faithful
    arrow = {True: f"{NBSP}↑", False: f"{NBSP}↓", None: ""}[t.up]
    floor = t.write(floors[0]) if floors else DASH
    title = {"fidelity": "Fidelity to dense", "quality": "Quality"}[group]
    unit = f" ({t.unit})" if t.unit else ""
    return Column(
        title, t.head + ("†" if stand_in else "") + arrow, f"{t.meaning} {t.direction}{unit}", tuple(cells), floor
    )


def _metric_cell(found: Metric | None, m: Method, group: str, write: Callable[[float | None], str]) -> Cell:
    if m.is_dense and group == "fidelity":
        return Cell("ref.", None)
    if found is None:
        return Cell(DASH, None)
    v = found.value
    if found.single_share and v.value in (0.0, 1.0):
        return Cell("yes" if v.value else "no", v.value)
    small = f"[{write(v.low)}, {write(v.high)}]" if v.has_interval else ""
    return Cell(write(v.value), v.value, small)


def _ran_dense(study: Study) -> list[Column]:
    cells = []
    for m in study.methods:
        reasons = [] if m.is_dense else [_reason(r) for r in m.ran_dense]
        calls = sum(int(finite(r.get("count")) or 0) for r in m.ran_dense)
        text = plural(calls, "call") if reasons else ("all" if m.is_dense else "none")
        cells.append(Cell(text, float("inf") if m.is_dense else calls, "; ".join(reasons)))
    return [Column("Record", "Ran dense", "calls in which the method stood aside", tuple(cells), kind="text")]


def _reason(entry: dict[str, Any]) -> str:
    layers = [string(x) for x in sequence(entry.get("layers"))]
    where = f" (layer{'s' if len(layers) > 1 else ''} {_ranges(layers)})" if layers else ""
    return f"{string(entry.get('reason'), 'no reason given')}{where}"


def _ranges(layers: Sequence[str]) -> str:
    """['0', '1', '2', '5'] -> '0–2 and 5'."""
    if not all(x.isdigit() for x in layers):
        return listed(list(layers))
    runs: list[list[int]] = []
    for n in sorted({int(x) for x in layers}):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return listed([str(a) if a == b else f"{a}–{b}" for a, b in runs])


# ---- HTML
def summary_table(study: Study) -> str:
    """The table of the page, plus a folded one with every metric where the first cannot show all."""
    groups = metric_groups(study)
    columns = [*_work(study), *_speed(study)]
    for group, names in groups.items():
        columns += [_metric_column(study, n, group) for n in names[: IN_TABLE[group]]]
    columns += _ran_dense(study)
    html = _table(study, columns, f"{study.title}: methods compared")
    rest = any(len(names) > IN_TABLE[group] for group, names in groups.items())
    if rest:
        every = [_metric_column(study, n, group) for group, names in groups.items() for n in names]
        html += (
            f"<details><summary>Every metric</summary>{_table(study, every, f'{study.title}: every metric')}</details>"
        )
    return html


def _table(study: Study, columns: list[Column], caption: str) -> str:
    spans: list[list[Any]] = []
    for c in columns:
        if spans and spans[-1][0] == c.group:
            spans[-1][1] += 1
        else:
            spans.append([c.group, 1])
    first = [i for i, c in enumerate(columns) if i == 0 or columns[i - 1].group != c.group]
    top = "".join(f'<th scope="colgroup" colspan="{n}" class="edge">{esc(g)}</th>' for g, n in spans)
    heads = "".join(
        f'<th scope="col" class="{c.kind}{" edge" if i in first else ""}" title="{esc(c.title)}" data-sort>'
        f"{esc(c.head)}</th>"
        for i, c in enumerate(columns)
    )
    rows = "".join(_row(m, [c.cells[i] for c in columns], columns, first) for i, m in enumerate(study.methods))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(caption)}"><table class="sortable">'
        f'<caption class="hidden">{esc(caption)}</caption><thead><tr class="groups"><td></td>{top}</tr>'
        f'<tr><th scope="col" data-sort>Method</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody>{_foot(columns, first)}</table></div>"
    )


def _row(m: Method, cells: list[Cell], columns: list[Column], first: list[int]) -> str:
    out = [f'<th scope="row" data-v="{esc(m.label)}">{swatch(m)}{esc(m.label)}{_ran_on(m)}</th>']
    for i, (cell, column) in enumerate(zip(cells, columns, strict=True)):
        small = "".join(f"<small>{esc(line)}</small>" for line in cell.small.splitlines())
        share = None if cell.bar is None else max(0.0, min(1.0, cell.bar))
        bar = f'<span class="bar" style="--w:{share:.3f}"></span>' if share is not None else ""
        sort = "" if cell.sort is None else f' data-v="{esc(cell.sort)}"'
        out.append(f'<td class="{column.kind}{" edge" if i in first else ""}"{sort}>{esc(cell.text)}{bar}{small}</td>')
    return f"<tr{' class=base' if m.is_dense else ''}>{''.join(out)}</tr>"


def _ran_on(m: Method) -> str:
    found = string(m.raw.get("implementation"))
    return f"<small>{esc(found)}</small>" if found else ""


def _foot(columns: list[Column], first: list[int]) -> str:
    if not any(c.foot and c.foot != DASH for c in columns):
        return ""
    cells = "".join(
        f'<td class="{c.kind}{" edge" if i in first else ""}">{esc(c.foot)}</td>' for i, c in enumerate(columns)
    )
    return f'<tfoot><tr><th scope="row">Noise floor<small>dense against dense</small></th>{cells}</tr></tfoot>'
