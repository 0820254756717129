"""Density and time by layer and step: one small map a method, one shared scale.

Letters: L layers, S steps.

* Values are quantised into twelve colour classes and equal neighbours in a row share one rectangle, so a static
  method costs few bytes. The exact numbers are in ``data-values`` for the pointer and in a folded table by layer.
* Zero is the low end of both scales, so that colours of different methods can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from foveal.pipelines.report.source import Method, Study, finite, mapping, sequence
from foveal.pipelines.report.table import swatch
from foveal.pipelines.report.words import esc, percent, seconds

LEVELS = 12
MAX_CELLS = 6000  # beyond that the numbers under the pointer are left out

Grid = list[list["float | None"]]


@dataclass(frozen=True)
class Kind:
    name: str
    write: Callable[[float | None], str]
    top: float
    line: str


def grid_of(value: Any) -> Grid:
    """A rectangular [L][S] of finite numbers or None; short rows are filled up, anything else reads as empty."""
    rows = [[finite(x) for x in sequence(row)] for row in sequence(value)]
    width = max((len(r) for r in rows), default=0)
    return [r + [None] * (width - len(r)) for r in rows] if width else []


def density_grid(m: Method) -> Grid:
    """Density by layer and step, else by layer alone (one column)."""
    density = mapping(m.raw.get("density"))
    return grid_of(density.get("by_layer_step")) or grid_of([[x] for x in sequence(density.get("per_layer"))])


def time_grid(m: Method) -> Grid:
    return grid_of(m.raw.get("time_by_layer_step"))


def heat_html(study: Study) -> str:
    """Maps of density (sparse methods) and of attention time (all methods). Empty string if the run has neither."""
    maps: list[tuple[Kind, list[tuple[Method, Grid]]]] = []
    densities = [(m, g) for m in study.sparse if (g := density_grid(m))]
    if densities:
        maps.append((Kind("Density", lambda v: percent(v, 1), 1.0, "Share of pairs attended"), densities))
    times = [(m, g) for m in study.methods if (g := time_grid(m))]
    top = max((v for _, g in times for row in g for v in row if v is not None), default=0.0)
    if times and top > 0:
        maps.append((Kind("Time in attention", seconds, top, "Time in attention per layer and step"), times))
    return "".join(f'<div class="heats"><h4>{esc(k.name)}</h4>{_legend(k)}{_maps(k, found)}</div>' for k, found in maps)


def _maps(kind: Kind, found: list[tuple[Method, Grid]]) -> str:
    figures = "".join(_figure(kind, m, g) for m, g in found)
    return f'<div class="maps">{figures}</div>{_by_layer(kind, found)}'


def _legend(kind: Kind) -> str:
    boxes = "".join(f'<rect class="h{i}" x="{i * 14}" y="0" width="14" height="10"/>' for i in range(LEVELS))
    svg = f'<svg viewBox="0 0 {LEVELS * 14} 10" width="{LEVELS * 14}" height="10" aria-hidden="true">{boxes}</svg>'
    scale = f"{kind.write(0.0)} {svg} {kind.write(kind.top)}"
    return f'<p class="legend">{esc(kind.line)}: {scale}. Layers run down, steps to the right.</p>'


def _level(value: float | None, top: float) -> int:
    return -1 if value is None else min(LEVELS - 1, max(0, int(LEVELS * value / top)))


def _figure(kind: Kind, m: Method, grid: Grid) -> str:
    layers, steps = len(grid), len(grid[0])
    rects = []
    for y, row in enumerate(grid):
        x = 0
        while x < steps:
            level, start = _level(row[x], kind.top), x
            while x < steps and _level(row[x], kind.top) == level:
                x += 1
            if level >= 0:
                rects.append(f'<rect class="h{level}" x="{start}" y="{y}" width="{x - start}" height="1"/>')
    known = [v for row in grid for v in row if v is not None]
    facts = (
        f"{kind.write(known[0])} everywhere"
        if known and kind.write(min(known)) == kind.write(max(known))
        else f"mean {kind.write(fmean(known))}, from {kind.write(min(known))} to {kind.write(max(known))}"
        if known
        else "no values"
    )
    data = ""
    if layers * steps <= MAX_CELLS:
        texts = ";".join(",".join("" if v is None else f"{v:.4g}" for v in row) for row in grid)
        data = f' data-values="{texts}" data-unit="{"%" if kind.name == "Density" else "s"}"'
    what = f"{kind.name} of {m.label}, {layers} layers by {steps} steps: {facts}"
    height = max(72, min(220, 12 * layers))
    return (
        f'<figure class="heat"{data}><svg viewBox="0 0 {steps} {layers}" preserveAspectRatio="none" '
        f'style="height:{height}px" role="img" aria-label="{esc(what)}">{"".join(rects)}</svg>'
        f"<figcaption>{swatch(m)}{esc(m.label)} <small>{esc(facts)}</small></figcaption></figure>"
    )


def _by_layer(kind: Kind, found: list[tuple[Method, Grid]]) -> str:
    layers = max(len(g) for _, g in found)
    heads = "".join(f'<th scope="col">{i}</th>' for i in range(layers))
    rows = ""
    for m, grid in found:
        means = [[v for v in row if v is not None] for row in grid]
        cells = "".join(f"<td>{kind.write(fmean(v)) if v else kind.write(None)}</td>" for v in means)
        cells += f"<td>{kind.write(None)}</td>" * (layers - len(grid))
        rows += f'<tr><th scope="row">{swatch(m)}{esc(m.label)}</th>{cells}</tr>'
    label = f"{kind.name}, mean over steps, by layer"
    return (
        f"<details><summary>{esc(label)}</summary>"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(label)}">'
        f'<table><caption class="hidden">{esc(label)}</caption>'
        f'<thead><tr><th scope="col">Layer</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )
