"""How to repeat the run: command, versions, prompts, seeds, resolved config, and the numbers to take away."""

from __future__ import annotations

import base64
import json
from math import isfinite
from typing import Any

from foveal.pipelines.report.source import Run, Study, mapping, sequence, string
from foveal.pipelines.report.words import esc, plural

MAX_LINK = 2_000_000


def repeat_html(run: Run) -> str:
    """The section at the end of the page."""
    command = string(run.document.get("command"))
    said = (
        f'<pre class="command"><code>{esc(command)}</code></pre>'
        if command
        else "<p>The run did not record its command.</p>"
    )
    designs = "".join(_design(s, len(run.studies) > 1) for s in run.studies)
    return f"{said}{_download(run)}{_versions(run)}{designs}{_configs(run)}"


def _download(run: Run) -> str:
    if len(run.raw) > MAX_LINK:
        return (
            f"<p>Every number is in result.json beside this file ({len(run.raw) / 1e6:.1f} MB, too large to embed).</p>"
        )
    uri = "data:application/json;base64," + base64.b64encode(run.raw).decode()
    size = f"{len(run.raw) / 1000:.0f} kB"
    link = f'<a class="button" download="result.json" href="{uri}">Save result.json</a>'
    return f"<p>{link} <small>every number of this page, {size}</small></p>"


def facts(pairs: dict[str, Any]) -> str:
    """A definition list of the entries that are there."""
    there = {k: v for k, v in pairs.items() if v not in (None, "", [], {})}
    there = {k: v for k, v in there.items() if not isinstance(v, float) or isfinite(v)}
    rows = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in there.items())
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _versions(run: Run) -> str:
    host = mapping(run.document.get("host"))
    return facts(
        {"foveal": run.document.get("foveal"), **{k: v for k, v in host.items() if not isinstance(v, (dict, list))}}
    )


def _design(study: Study, named: bool) -> str:
    prompts, seeds = sequence(study.design.get("prompts")), sequence(study.design.get("seeds"))
    head = f"{study.title}: " if named else ""
    listed = "".join(f"<li>{esc(p)}</li>" for p in prompts)
    title = f"{head}{plural(len(prompts), 'prompt')}, {plural(len(seeds), 'seed')}"
    numbers = f"<p>Seeds: {esc(', '.join(map(str, seeds)))}</p>" if seeds else ""
    rest = {k: v for k, v in study.design.items() if k not in ("prompts", "seeds")}
    model = {
        f"model {k}": v for k, v in study.model.items() if k in ("id", "sha256", "dtype", "steps", "guidance", "shift")
    }
    body = f'{numbers}<ol class="prompts" start="0">{listed}</ol>{facts({**model, **rest})}'
    return f"<details><summary>{esc(title)}</summary>{body}</details>"


def _configs(run: Run) -> str:
    path = run.folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    out = (
        f"<details><summary>Resolved config (config.yaml)</summary><pre><code>{esc(text)}</code></pre></details>"
        if text
        else ""
    )
    for study in run.studies:
        configs = {m.label: m.raw.get("config") for m in study.methods if m.raw.get("config")}
        if configs:
            text = json.dumps(configs, indent=2, ensure_ascii=False, sort_keys=True)
            head = f"{study.title}: settings of each method"
            out += f"<details><summary>{esc(head)}</summary><pre><code>{esc(text)}</code></pre></details>"
    return out
