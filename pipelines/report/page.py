"""The page: sections in order, style and script inlined, one file written.

* No clock, no random number, no environment: the same run folder gives the same bytes.
* A content security policy in the page forbids every network access: "self-contained" is enforced by the browser too.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from foveal.pipelines.report.clips import clips_html
from foveal.pipelines.report.finding import finding
from foveal.pipelines.report.glossary import glossary_html, term
from foveal.pipelines.report.heat import heat_html
from foveal.pipelines.report.media import reels
from foveal.pipelines.report.plan_view import plans_html
from foveal.pipelines.report.repeat import facts, repeat_html
from foveal.pipelines.report.scatter import scatter_html
from foveal.pipelines.report.shares import shares_html
from foveal.pipelines.report.source import Run, Study, finite, mapping, read_run, sequence, string
from foveal.pipelines.report.table import summary_table
from foveal.pipelines.report.words import esc, number

STYLES = ("base.css", "table.css", "plots.css", "clips.css", "plan.css")
SCRIPTS = ("common.js", "table.js", "plots.js", "clips.js", "plan.js", "plan_draw.js", "start.js")
MEDIA_BYTES = 3_600_000
NO_PLOT = "no method has both a metric and a place on the axis"
TOY = (
    "is a toy model of a synthetic world. "
    "Its numbers are not, and do not predict, numbers of Wan, Flux or any large model."
)


def build_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from ``run_dir/result.json``, the media and the plans beside it.

    Returns the path written. Raises ``ReportError`` (one sentence) if result.json is missing, unreadable or empty.
    """
    run = read_run(Path(run_dir))
    path = run.folder / "report.html"
    path.write_text(page(run), encoding="utf-8")
    return path


def page(run: Run) -> str:
    """The whole page as text."""
    budget = MEDIA_BYTES // len(run.studies)
    studies = "".join(_study(s, budget, len(run.studies) > 1) for s in run.studies)
    ids = list(dict.fromkeys(i for s in run.studies for i in s.metric_ids()))
    parts = {
        "title": esc(_title(run)),
        "style": "".join(_asset(name) for name in STYLES),
        "script": "".join(_asset(name) for name in SCRIPTS),
        "nav": _nav(run),
        "header": _header(run),
        "studies": studies,
        "repeat": repeat_html(run),
        "glossary": glossary_html(ids),
    }
    return Template(_asset("page.html")).substitute(parts)


def _asset(name: str) -> str:
    return files("foveal.pipelines.report").joinpath(name).read_text(encoding="utf-8")


def _title(run: Run) -> str:
    return string(run.document.get("title")) or (
        run.studies[0].title if len(run.studies) == 1 else "Sparse attention, compared"
    )


def _nav(run: Run) -> str:
    links = "".join(f'<a href="#study{s.index}">{esc(s.title)}</a>' for s in run.studies)
    return links + '<a href="#repeat">Repeat it</a><a href="#glossary">Glossary</a>'


def _header(run: Run) -> str:
    host = mapping(run.document.get("host"))
    threads = finite(host.get("threads"))
    device = string(host.get("gpu")) or string(host.get("cpu"), "device not recorded")
    if not host.get("gpu") and threads:
        device += f", {number(threads, 0)} thread{'s' if threads != 1 else ''}"
    versions = ", ".join(f"{k} {host[k]}" for k in ("torch", "triton", "diffusers") if host.get(k))
    return f"<h1>{esc(_title(run))}</h1>" + facts(
        {
            "Date": _date(string(run.document.get("date"))),
            "Device": device,
            "foveal": run.document.get("foveal"),
            "With": versions,
        }
    )


def _date(text: str) -> str:
    """'2026-01-02T03:04:05Z' -> '2026-01-02 03:04 UTC'; anything else stays as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(?:Z|\+00:00)", text)
    return f"{found[1]} {found[2]} UTC" if found else text


def _study(s: Study, budget: int, several: bool) -> str:
    found = reels(s, budget)
    name = f"study{s.index}"
    sections = [
        ("See it", clips_html(s, found)),
        ("The numbers", summary_table(s) + _skipped(s)),
        (f"Quality against {'speed' if s.has_speed else 'work'}", scatter_html(s) or _absent(NO_PLOT)),
        ("What a query sees", plans_html(s, found)),
        ("Layer by layer, step by step", heat_html(s) or _absent("the run recorded neither density nor time by layer")),
    ]  # fmt: skip
    if s.has_speed or s.amdahl or any(m.seconds("attention") is not None for m in s.methods):
        sections.append(("Attention and the rest", shares_html(s)))
    body = "".join(f'<section class="part"><h3>{esc(head)}</h3>{html}</section>' for head, html in sections)
    said = finding(s)
    caveats = f'<p class="caveats">{esc(" ".join(said[1:]))}</p>' if said[1:] else ""
    rest = _own_note(s)
    note = f'<p class="note">{esc(rest)}</p>' if rest else ""
    title = f"<h2>{esc(s.title)}</h2>" if several else f'<h2 class="hidden">{esc(s.title)}</h2>'
    return (
        f'<article class="study" id="{name}">{title}{_toy(s)}<p class="finding">{esc(said[0])}</p>{caveats}{note}'
        f"{facts(_model(s))}{body}</article>"
    )


def _own_note(s: Study) -> str:
    """The study's note without the model's, which stands in the banner already."""
    said = string(s.model.get("note")).strip().rstrip(".").casefold()
    if said and s.note.casefold().startswith(said):
        return s.note[len(said) :].lstrip(". ")
    return s.note


def _absent(why: str) -> str:
    return f"<p>Not drawn: {esc(why)}.</p>"


def _toy(s: Study) -> str:
    said = string(s.model.get("note"))
    if not s.model.get("toy"):
        return f'<p class="note">{esc(said)}</p>' if said else ""
    name = string(s.model.get("id"), "This model")
    text = f"{name} {string(s.model.get('toy_text')) or TOY}"
    more = f" <span>{esc(said)}</span>" if said and "toy" not in said.casefold() else ""
    more += f" <span>{esc(outside)}</span>" if (outside := string(s.model.get("outside"))) else ""
    return f'<p class="toy"><strong>Toy model.</strong> {esc(text)}{more}</p>'


def _model(s: Study) -> dict[str, Any]:
    m = s.model
    grid = " × ".join(number(finite(n), 0) for n in sequence(m.get("grid")))
    layers, heads = finite(m.get("layers")), finite(m.get("heads"))
    tokens = finite(m.get("tokens"))
    params = finite(m.get("params"))
    return {
        "Model": m.get("id"),
        "Tokens": f"{number(tokens, 0)}{f' ({grid})' if grid else ''}" if tokens else grid,
        "Steps": m.get("steps"),
        "Guidance": m.get("guidance"),
        "Precision": m.get("dtype"),
        "Parameters": f"{params / 1e6:.2f} M" if params else None,
        "Layers × heads": f"{number(layers, 0)} × {number(heads, 0)}" if layers and heads else None,
        "Samples": _samples(s),
        "Dense first steps": s.design.get("dense_steps"),
    }


def _samples(s: Study) -> str:
    prompts, seeds = len(sequence(s.design.get("prompts"))), len(sequence(s.design.get("seeds")))
    return f"{prompts} prompt{'s' * (prompts != 1)} × {seeds} seed{'s' * (seeds != 1)}" if prompts and seeds else ""


def _skipped(s: Study) -> str:
    named = [(term(string(e.get("id"), "unnamed")).head, string(e.get("reason"), "no reason given")) for e in s.skipped]
    rows = "".join(f"<li><strong>{esc(head)}</strong> not computed: {esc(reason)}</li>" for head, reason in named)
    return f'<ul class="skipped">{rows}</ul>' if rows else ""
