"""Quality against speed: one point a method, Pareto front, intervals, direct labels. Plain SVG, no script needed.

* Drawn twice, wide and narrow; the style sheet shows the one that fits, so that text keeps its size on a phone.
* Without speed measurements the horizontal axis is density (less work to the left).
* Axes are never flipped; titles say which direction is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from foveal.pipelines.report.glossary import Term, term
from foveal.pipelines.report.labels import Label, Rect, place
from foveal.pipelines.report.source import Method, Study, Value
from foveal.pipelines.report.words import esc, number, percent, ratio

Y_CHOICES = ("psnr", "step_rel_l1", "ssim", "world_psnr", "emoji_psnr", "acc_all")
DODGE = 11.0  # pixels between points that stand side by side
Scale = Callable[[Any], float]  # a value to pixels
SIZES = {"wide": (760, 400), "narrow": (358, 360)}


@dataclass(frozen=True)
class Point:
    method: Method
    x: Value
    y: Value
    front: bool = False


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: tuple[float, ...]


def axis(values: list[float], count: int = 5) -> Axis:
    """Round ticks around the values, with a margin."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.12 * span, high + 0.12 * span
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(k for k in (1, 2, 2.5, 5, 10) if k * unit >= raw * 0.999)
    first = math.ceil(low / step)
    ticks = tuple(round(step * i, 12) for i in range(first, math.floor(high / step) + 1))
    return Axis(low, high, ticks)


def scale(a: Axis, first: float, last: float) -> Scale:
    """From values to pixels."""
    return lambda v: first + (v - a.low) / (a.high - a.low) * (last - first)


def _x(method: Method, speed: bool) -> Value:
    if not speed:
        return Value(method.density)
    up = method.speedup("end_to_end")
    return Value(1.0) if method.is_dense and up.value is None else up


def points(study: Study, name: str, speed: bool) -> list[Point]:
    """Methods that have both coordinates; dense only where the metric is not fidelity to itself."""
    higher = term(name, getattr(study.sample_metric(name), "higher_is_better", None)).up is not False
    found = []
    for m in study.methods:
        metric = m.metric(name)
        x = _x(m, speed)
        if metric is None or metric.value.value is None or x.value is None or metric.single_share:
            continue
        if not (m.is_dense and metric.family in ("fidelity", "attention")):
            found.append(Point(m, x, metric.value))
    return [Point(p.method, p.x, p.y, not any(_beats(q, p, speed, higher) for q in found)) for p in found]


def _beats(q: Point, p: Point, speed: bool, higher: bool) -> bool:
    """q is at least as good on both axes and better on one."""
    dx = (q.x.value or 0) - (p.x.value or 0)
    dy = (q.y.value or 0) - (p.y.value or 0)
    dx, dy = dx if speed else -dx, dy if higher else -dy
    return dx >= 0 and dy >= 0 and (dx > 0 or dy > 0)


def scatter_html(study: Study) -> str:
    """Every plot the study has data for; tabs where there are several. Empty string if there is none."""
    speed = study.has_speed
    ids = [i for i in Y_CHOICES if i in study.metric_ids()] or study.metric_ids()[:1]
    drawn = [(i, pts) for i in ids if (pts := points(study, i, speed))]
    if not drawn or not any(not p.method.is_dense for _, pts in drawn for p in pts):
        return ""
    figures = []
    for name, pts in drawn:
        t = term(name, getattr(study.sample_metric(name), "higher_is_better", None))
        svgs = "".join(_svg(study, name, t, pts, speed, kind) for kind in SIZES)
        figures.append(
            f'<figure class="plot" data-tab="{esc(t.head)}">{svgs}'
            f"<figcaption>{_caption(t, pts, speed)}</figcaption></figure>"
        )
    return f'<div class="tabs" data-label="Vertical axis">{"".join(figures)}</div>'


def _caption(t: Term, pts: list[Point], speed: bool) -> str:
    side = "to the right is faster" if speed else "to the left is less work"
    up = {True: "up is better", False: "down is better", None: "compare with dense"}[t.up]
    spread = any(p.y.has_interval or p.x.has_interval for p in pts)
    bars = "Bars are 95 % intervals." if spread else "No intervals: too few samples for any."
    if spread:
        bars += " Points at nearly the same place stand side by side."
    return (
        f"{esc(t.head)}: {esc(t.meaning)} Here {side} and {up}. Filled points lie on the Pareto front: "
        f"no other method of this run is at least as good on both axes and better on one. {bars}"
    )


# ---- drawing
def _svg(study: Study, name: str, t: Term, pts: list[Point], speed: bool, kind: str) -> str:
    width, height = SIZES[kind]
    left, right, top, bottom = 54, 16, 14, 46
    area = Rect(left, top, width - right, height - bottom)
    xs = [v for p in pts for v in (p.x.value, p.x.low, p.x.high) if v is not None] + ([1.0] if speed else [])
    ys = [v for p in pts for v in (p.y.value, p.y.low, p.y.high) if v is not None]
    ax, ay = axis(xs, 6 if kind == "wide" else 3), axis(ys, 5)
    sx, sy = scale(ax, area.x0, area.x1), scale(ay, area.y1, area.y0)
    at = [(x, sy(p.y.value)) for p, x in zip(pts, dodged(pts, sx), strict=True)]
    marks, obstacles = _error_bars(pts, at, sx, sy)
    floor, note = _floor(study, name, t, area, ay, sy)
    obstacles += [*_guides(area, sx, speed), *note]
    labels = place([(*xy, p.method.label) for xy, p in zip(at, pts, strict=True)], area, obstacles)
    body = _frame(area, ax, ay, sx, sy, t, speed) + floor + _front(pts, at) + marks
    body += "".join(_dot(p, label, xy, t, speed) for p, label, xy in zip(pts, labels, at, strict=True))
    what = f"{t.head} against {'end-to-end speed-up' if speed else 'density'} for {len(pts)} methods"
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="group" aria-label="{esc(what)}">{body}</svg>'


def dodged(pts: list[Point], sx: Scale) -> list[float]:
    """Horizontal places; where vertical error bars would lie on each other, points stand side by side instead."""
    xs = [sx(p.x.value) for p in pts]
    if not any(p.y.has_interval for p in pts):
        return xs
    groups: list[list[int]] = []
    for i in sorted(range(len(xs)), key=lambda j: (xs[j], j)):
        if groups and xs[i] - xs[groups[-1][0]] < DODGE:
            groups[-1].append(i)
        else:
            groups.append([i])
    out = list(xs)
    for group in groups:
        for place_, i in enumerate(group):
            out[i] = xs[i] + (place_ - (len(group) - 1) / 2) * DODGE
    return out


def _guides(area: Rect, sx: Scale, speed: bool) -> list[Rect]:
    if not speed:
        return []
    x = sx(1.0)
    return [Rect(x - 1, area.y0, x + 1, area.y1), Rect(x + 2, area.y0, x + 86, area.y0 + 18)]


def _decimals(ticks: tuple[float, ...]) -> int:
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    return max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if f"{step:e}"[:3] == "2.5" else 0)


def _frame(area: Rect, ax: Axis, ay: Axis, sx: Scale, sy: Scale, t: Term, speed: bool) -> str:
    out, dx, dy = [], _decimals(ax.ticks), _decimals(ay.ticks)
    for v in ay.ticks:
        text = f"{number(100 * v, max(0, dy - 2))}\u00a0%" if t.style == "%" else number(v, dy)
        out.append(f'<line class="grid" x1="{area.x0:.1f}" x2="{area.x1:.1f}" y1="{sy(v):.1f}" y2="{sy(v):.1f}"/>')
        out.append(f'<text class="tick" x="{area.x0 - 8:.1f}" y="{sy(v) + 4:.1f}" text-anchor="end">{text}</text>')
    for v in ax.ticks:
        text = ratio(v, dx) if speed else f"{number(100 * v, max(0, dx - 2))}\u00a0%"
        out.append(f'<line class="grid" y1="{area.y0:.1f}" y2="{area.y1:.1f}" x1="{sx(v):.1f}" x2="{sx(v):.1f}"/>')
        out.append(f'<text class="tick" y="{area.y1 + 18:.1f}" x="{sx(v):.1f}" text-anchor="middle">{text}</text>')
    if speed:
        out.append(f'<line class="one" x1="{sx(1):.1f}" x2="{sx(1):.1f}" y1="{area.y0:.1f}" y2="{area.y1:.1f}"/>')
        out.append(f'<text class="note" x="{sx(1) + 6:.1f}" y="{area.y0 + 13:.1f}">dense speed</text>')
    xt = "end-to-end speed-up over dense →" if speed else "← less work · density"
    arrow = {True: " ↑ better", False: " ↓ better", None: ""}[t.up]
    yt = f"{t.head}{f' ({t.unit})' if t.unit else ''}{arrow}"
    mid, centre = (area.y0 + area.y1) / 2, (area.x0 + area.x1) / 2
    out.append(f'<text class="title" x="{centre:.1f}" y="{area.y1 + 38:.1f}" text-anchor="middle">{esc(xt)}</text>')
    out.append(
        f'<text class="title" transform="translate(12 {mid:.1f}) rotate(-90)" text-anchor="middle">{esc(yt)}</text>'
    )
    return "".join(out)


def _floor(study: Study, name: str, t: Term, area: Rect, ay: Axis, sy: Scale) -> tuple[str, list[Rect]]:
    """The noise floor, as a line where it is inside the picture, else as words."""
    floors = [m.floor for method in study.methods if (m := method.metric(name)) and m.floor is not None]
    if not floors:
        return "", []
    inside = ay.low <= floors[0] <= ay.high
    y = sy(floors[0]) if inside else (area.y0 if floors[0] > ay.high else area.y1)
    text = f"noise floor {t.write(floors[0])}" + ("" if inside else " (outside)")
    line = f'<line class="floor" x1="{area.x0:.1f}" x2="{area.x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>' if inside else ""
    ty = y - 5 if y > area.y0 + 20 else y + 13
    box = Rect(area.x1 - 8 - 6.5 * len(text), ty - 13, area.x1, ty + 4)
    return f'{line}<text class="note" x="{area.x1 - 4:.1f}" y="{ty:.1f}" text-anchor="end">{esc(text)}</text>', [box]


def _front(pts: list[Point], at: list[tuple[float, float]]) -> str:
    front = sorted(xy for p, xy in zip(pts, at, strict=True) if p.front)
    if len(front) < 2:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    return f'<polyline class="front" points="{path}"/>'


def _error_bars(pts: list[Point], at: list[tuple[float, float]], sx: Scale, sy: Scale) -> tuple[str, list[Rect]]:
    out, boxes = [], []
    for p, (x, y) in zip(pts, at, strict=True):
        c = p.method.colour
        if p.y.has_interval:
            lo, hi = sy(p.y.low), sy(p.y.high)
            out.append(
                f'<path class="err k{c}" d="M{x:.1f} {lo:.1f}V{hi:.1f}M{x - 4:.1f} {lo:.1f}h8M{x - 4:.1f} {hi:.1f}h8"/>'
            )
            boxes.append(Rect(x - 5, min(lo, hi), x + 5, max(lo, hi)))
        if p.x.has_interval:
            lo, hi = sx(p.x.low), sx(p.x.high)
            out.append(
                f'<path class="err k{c}" d="M{lo:.1f} {y:.1f}H{hi:.1f}M{lo:.1f} {y - 4:.1f}v8M{hi:.1f} {y - 4:.1f}v8"/>'
            )
            boxes.append(Rect(min(lo, hi), y - 5, max(lo, hi), y + 5))
    return "".join(out), boxes


def _dot(p: Point, label: Label, xy: tuple[float, float], t: Term, speed: bool) -> str:
    (x, y), c, box = xy, p.method.colour, label.box
    tip = f"{p.method.label}: {t.head} {t.write(p.y.value)}{' ' + t.unit if t.unit else ''}"
    tip += f" [{t.write(p.y.low)}, {t.write(p.y.high)}]" if p.y.has_interval else ""
    tip += f", {ratio(p.x.value)} end to end" if speed else ""
    tip += f", density {percent(p.method.density)}" + (", on the Pareto front" if p.front else "")
    lx, ly = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
    line = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{lx:.1f}" y2="{ly:.1f}"/>' if label.leader else ""
    dot = f'<circle class="k{c}{" on" if p.front else ""}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    anchor, ax = (
        ("end", box.x1) if box.x1 <= x else ("start", box.x0) if box.x0 >= x else ("middle", (box.x0 + box.x1) / 2)
    )
    text = f'<text class="label" x="{ax:.1f}" y="{box.y1 - 4:.1f}" text-anchor="{anchor}">{esc(label.text)}</text>'
    said = esc(tip)
    head = f'<g class="dot" tabindex="0" role="img" aria-label="{said}" data-tip="{said}"><title>{said}</title>'
    return f"{head}{line}{dot}{text}</g>"
