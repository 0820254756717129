"""The plan on its grid: a static picture of one query, and the data from which the script draws any other.

Letters: T, H, W the token grid; R query blocks, C key blocks.

* The static picture is a small palette PNG, one pixel a token, enlarged without smoothing by the style sheet.
* Plans whose data would weigh more than ``MAX_BYTES`` keep the static picture only, and the page says so.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveal.pipelines.report.media import Reel, columns
from foveal.pipelines.report.plan_data import FULL, MASKED, NOT, PARTIAL, PROXY, PlanView, plan_view
from foveal.pipelines.report.source import Method, Study, sequence
from foveal.pipelines.report.table import swatch
from foveal.pipelines.report.words import esc, listed, percent, script_json

MAX_BYTES = 700_000
PALETTE = {
    NOT: (128, 128, 128, 40),
    FULL: (31, 111, 178),
    PARTIAL: (20, 150, 130),
    PROXY: (150, 90, 190),
    MASKED: (160, 190, 190),
}
QUERY = (232, 93, 38)
Drawn = list[tuple[Method, PlanView]]


def load_views(study: Study) -> tuple[Drawn, dict[str, str]]:
    """Views of the plans that the run kept, and a reason for each sparse method that has none."""
    drawn: Drawn = []
    missing: dict[str, str] = {}
    for m in study.sparse:
        path = study.file("plans", f"{m.id}.safetensors")
        if path is None:
            missing[m.label] = "the run kept no plan"
            continue
        try:
            view = _load(study, path)
        except (
            Exception
        ) as err:  # a plan that cannot be read must not cost the report its numbers; the page gives the reason
            missing[m.label] = f"its file could not be read ({type(err).__name__})"
            continue
        if view is None:
            missing[m.label] = "it does not lie on the model's grid, or is too large to draw"
        else:
            drawn.append((m, view))
    return drawn, missing


def _load(study: Study, path: Path) -> PlanView | None:
    from foveal.plugins.plans.file import load_plan

    plan, info = load_plan(path)
    grid = info.get("grid") or sequence(study.model.get("grid"))
    sizes = (*(1 for _ in range(3 - len(grid))), *(int(n) for n in grid))
    if len(sizes) != 3:
        return None
    visual = info.get("visual")
    return plan_view(plan, sizes, None if visual is None else int(visual.start))


def plans_html(study: Study, reels: list[Reel]) -> str:
    """Pictures and data of every plan; a sentence for each method without one."""
    drawn, missing = load_views(study)
    reasons = {why: [who for who, w in missing.items() if w == why] for why in dict.fromkeys(missing.values())}
    notes = "".join(
        f"<p class=legend>No plan drawn for {esc(listed(who))}: {esc(why)}.</p>" for why, who in reasons.items()
    )
    if not drawn:
        return notes or "<p>No plan drawn: no sparse method ran.</p>"
    entries, figures, too_large = [], [], []
    for m, view in drawn:
        entry = _entry(m, view)
        if sum(len(v) for v in entry.values() if isinstance(v, str)) > MAX_BYTES:
            too_large.append(m.label)
        else:
            entries.append(entry)
        figures.append(_figure(m, view, keep=m.label in too_large))
    notes += "".join(
        f"<p class=legend>The plan of {esc(who)} is too large to explore here; one query is shown.</p>"
        for who in too_large
    )
    data = script_json({"plans": entries, "picture": _picture(study, reels)})
    return (
        f'<div class="plan" data-plan hidden></div><script type="application/json" data-for="plan">{data}</script>'
        f'<div class="plan-static">{"".join(figures)}</div>{notes}'
    )


def _picture(study: Study, reels: list[Reel]) -> dict[str, Any] | None:
    """The dense clip of the first sample, to look through the plan at it."""
    clips = [(i, c) for i, c in enumerate(reels[0].clips) if c.method.is_dense] if reels else []
    if not clips:
        return None
    i, clip = clips[0]
    s = clip.sprite
    return {
        "sprite": f"f{study.index}-0-{i}",
        "frames": s.frames,
        "width": s.width,
        "height": s.height,
        "columns": s.columns,
    }


# ---- data for the script
def _pack(x: NDArray[Any] | None, kind: str) -> str | None:
    return None if x is None else base64.b64encode(np.ascontiguousarray(x).astype(kind).tobytes()).decode()


def _entry(m: Method, v: PlanView) -> dict[str, Any]:
    heads, rows, cols = v.kinds.shape
    return {
        "label": m.label, "plan": v.label, "colour": m.colour, "grid": list(v.grid), "visual": v.visual,
        "heads": heads, "rows": rows, "cols": cols, "queries": len(v.q_block), "keys": len(v.k_block),
        "density": v.density, "visited": v.visited,
        "axes": 0 if v.coord is None else len(v.coord),
        "qBlock": _pack(v.q_block, "<i2"), "kBlock": _pack(v.k_block, "<i2"), "kinds": _pack(v.kinds, "i1"),
        "low": _pack(v.low, "<i2"), "high": _pack(v.high, "<i2"), "coord": _pack(v.coord, "<i2"),
        "bits": None if v.bits is None else _pack(np.packbits(v.bits, axis=-1, bitorder="little"), "u1"),
    }  # fmt: skip


# ---- the static picture
def centre(view: PlanView) -> int:
    """The query in the middle of the grid, in the caller's numbering."""
    t, h, w = view.grid
    return view.visual + ((t // 2) * h + h // 2) * w + w // 2


def raster(view: PlanView, query: int) -> NDArray[np.int8]:
    """States on the grid for one query, -1 on the query's own block. -> int8 [T, H, W]"""
    size = int(np.prod(view.grid))
    span = slice(view.visual, view.visual + size)
    out = view.states(query)[span].copy()
    if view.q_block[query] >= 0:
        out[view.q_block[span] == view.q_block[query]] = -1
    return out.reshape(view.grid)


def still(view: PlanView) -> str:
    """Data URI of a PNG: frames side by side in rows, one pixel a token, a transparent line between frames."""
    t, h, w = view.grid
    cols = columns(t) * (2 if t > 2 else 1)
    out = np.zeros((-(-t // cols) * (h + 1) - 1, min(t, cols) * (w + 1) - 1, 4), np.uint8)
    table = np.zeros((256, 4), np.uint8)
    for state, colour in {**PALETTE, -1: QUERY}.items():
        table[state] = (*colour, 255)[:4]
    for i, frame in enumerate(raster(view, centre(view))):
        y, x = divmod(i, cols)
        out[y * (h + 1) : y * (h + 1) + h, x * (w + 1) : x * (w + 1) + w] = table[frame.astype(np.uint8)]
    data = io.BytesIO()
    Image.fromarray(out, "RGBA").save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _figure(m: Method, view: PlanView, keep: bool) -> str:
    t, h, w = view.grid
    query = centre(view) - view.visual
    place = f"frame {query // (h * w)}, row {query // w % h}, column {query % w}"
    states = view.states(centre(view))
    attended = int(((states == FULL) | (states == PARTIAL)).sum())
    facts = (
        f"the query at {place} attends {attended:,} of {len(states):,} keys; plan density {percent(view.density, 1)}"
    )
    alt = f"Plan of {m.label} on a grid of {t} frames of {h} by {w} tokens: {facts}."
    return (
        f'<figure{" class=keep" if keep else ""}><img src="{still(view)}" alt="{esc(alt)}">'
        f"<figcaption>{swatch(m)}{esc(m.label)} <small>{esc(facts)}</small></figcaption></figure>"
    )
