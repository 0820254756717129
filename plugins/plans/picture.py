"""Pictures of plans: what one query block visits, drawn on the token grid, and the whole block map.

Letters: R query blocks, C key blocks, T frames, H rows, W columns.

* Grid pictures mark one query with a dot: strong colours are keys it attends, pale ones are visited by its
  block and masked away, grey-violet ones are seen through a pooled stand-in.
* Pictures are Pillow images; nothing is written here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveal.kernels.block_sparse import BlockPlan, PlanError
from foveal.kernels.block_sparse.counting import full_visits
from foveal.plugins.order import by
from foveal.plugins.plans.seen import FULL, NOT_VISITED, PARTIAL, PROXY, QUERY, picked, query_tokens, seen_from
from foveal.plugins.site import Span

COLOURS = np.array(
    [(236, 239, 243), (201, 190, 222), (250, 222, 176), (240, 160, 60), (62, 124, 196), (214, 57, 68)], dtype=np.uint8
)
NAMES = (
    "not visited",
    "through a proxy",
    "visited, masked away",
    "attended, partial block",
    "attended, full block",
    "query block",
)
INK, PALE_INK, PAPER, EDGE = (32, 36, 44), (110, 118, 130), (255, 255, 255), (255, 255, 255)
MARGIN, GAP, LINE = 18, 14, 20


def draw_plan(
    plan: BlockPlan,
    grid: Sequence[int],
    *,
    visual: Span | None = None,
    query: int | None = None,
    batch: int = 0,
    head: int = 0,
    width: int = 1080,
    max_frames: int = 12,
    title: str | None = None,
) -> Image.Image:
    """What one query block visits on the grid (H, W) or (T, H, W); 1-D grids are one row.

    visual   where the grid tokens lie in the sequence; default: the start of it
    query    the token of the caller's sequence that is marked, and whose block is shown; default: the middle of the grid
    width    of the picture, in pixels; max_frames: more frames than this are thinned out, the query's own stays
    Raises ``PlanError`` where the grid does not fit the plan.
    """
    frames, rows, cols = (1,) * (3 - len(grid)) + tuple(grid)
    n = frames * rows * cols
    visual = Span(0, n) if visual is None else visual
    if visual.size != n or visual.stop > plan.n_keys:
        raise PlanError(
            f"the grid {by(grid)} has {n} tokens; the plan has {plan.n_keys} keys and its visual span is {tuple(visual)}."
        )
    query = (
        visual.start + int(np.ravel_multi_index((frames // 2, rows // 2, cols // 2), (frames, rows, cols)))
        if query is None
        else query
    )
    seen = seen_from(plan, query, batch, head)
    state, block = seen.state.copy(), seen.block
    state[query_tokens(plan, seen.query_block, batch, head)] = QUERY
    volume = state[visual.start : visual.stop].reshape(frames, rows, cols)
    owner = block[visual.start : visual.stop].reshape(frames, rows, cols)
    here = np.unravel_index(query - visual.start, (frames, rows, cols)) if 0 <= query - visual.start < n else None
    shown = _chosen_frames(frames, max_frames, 0 if here is None else int(here[0]))
    cell = _cell(len(shown), rows, cols, width)
    tiles = [_frame(volume[t], owner[t], cell) for t in shown]
    if here is not None:
        _mark(tiles[shown.index(int(here[0]))], int(here[1]), int(here[2]), cell)
    outside = np.delete(state, np.arange(visual.start, visual.stop))
    return _page(tiles, shown, frames, outside, state, width, title or str(plan))


def draw_block_map(
    plan: BlockPlan, *, batch: int = 0, head: int = 0, width: int = 720, title: str | None = None
) -> Image.Image:
    """The whole plan: query blocks down, key blocks across, each entry coloured by how it is visited."""
    visited = np.asarray(picked(plan.visits(), batch, head).cpu())
    full = np.asarray(picked(full_visits(plan), batch, head).cpu())
    state = np.where(full, FULL, np.where(visited, PARTIAL, NOT_VISITED)).astype(np.uint8)
    if plan.proxies is not None:
        held = np.asarray(picked(plan.proxies.n, batch, head).cpu()) > 0
        state = np.where(~visited & held, PROXY, state).astype(np.uint8)
    cell = max(1, (width - 2 * MARGIN) // max(state.shape))
    picture = Image.fromarray(COLOURS[state])
    size = (state.shape[1] * cell, state.shape[0] * cell)
    if max(size) > width - 2 * MARGIN:  # more blocks than pixels: average instead of dropping blocks
        factor = (width - 2 * MARGIN) / max(size)
        picture = picture.resize(
            (max(1, round(size[0] * factor)), max(1, round(size[1] * factor))), Image.Resampling.BOX
        )
    else:
        picture = picture.resize(size, Image.Resampling.NEAREST)
    heading = title or str(plan)
    caption = f"{plan.n_q_blocks} query blocks down, {plan.n_kv_blocks} key blocks across"
    return _page([picture], [0], 1, np.zeros(0, np.uint8), state, width, heading, caption)


def _chosen_frames(count: int, most: int, own: int) -> list[int]:
    if count <= most:
        return list(range(count))
    spread = np.linspace(0, count - 1, most).round().astype(int)
    spread[np.argmin(np.abs(spread - own))] = own
    return sorted(set(spread.tolist()))


def _cell(frames: int, rows: int, cols: int, width: int) -> int:
    """Pixels per token so that the frames fill the width in rows of a pleasing number."""
    across = _across(frames, rows, cols)
    return max(1, min(40, (width - 2 * MARGIN - (across - 1) * GAP) // (across * cols)))


def _across(frames: int, rows: int, cols: int) -> int:
    return max(1, min(frames, round(math.sqrt(frames * 1.6 * rows / max(1, cols)))))


def _frame(state: np.ndarray, owner: np.ndarray, cell: int) -> Image.Image:
    """One frame: a square per token, pale lines between key blocks, an outline round the query block."""
    rows, cols = state.shape
    picture = Image.fromarray(COLOURS[state]).resize((cols * cell, rows * cell), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    thick = 2 if cell >= 12 else 1
    if cell >= 3:
        for y, x in np.argwhere(owner[:, 1:] != owner[:, :-1]):
            draw.line([((x + 1) * cell, y * cell), ((x + 1) * cell, (y + 1) * cell - 1)], fill=EDGE, width=thick)
        for y, x in np.argwhere(owner[1:] != owner[:-1]):
            draw.line([(x * cell, (y + 1) * cell), ((x + 1) * cell - 1, (y + 1) * cell)], fill=EDGE, width=thick)
    draw.rectangle([0, 0, cols * cell - 1, rows * cell - 1], outline=PALE_INK)
    return picture


def _mark(picture: Image.Image, y: int, x: int, cell: int) -> None:
    """A dot on the marked query token."""
    radius = max(1.0, min(cell * 0.28, 6))
    cx, cy = (x + 0.5) * cell, (y + 0.5) * cell
    ImageDraw.Draw(picture).ellipse([cx - radius, cy - radius, cx + radius, cy + radius], fill=PAPER)


def _page(
    tiles: list[Image.Image],
    shown: list[int],
    frames: int,
    outside: np.ndarray,
    state: np.ndarray,
    width: int,
    title: str,
    caption: str = "",
) -> Image.Image:
    across = _across(len(tiles), tiles[0].height, tiles[0].width)
    down = -(-len(tiles) // across)
    label = LINE if frames > 1 else 0
    legend = _legend_rows(sorted(set(np.unique(state).tolist()), reverse=True), width)
    titles = _wrapped(title, width)
    bar = LINE + 18 + GAP if len(outside) else 0
    top = MARGIN + len(titles) * LINE + (LINE if caption else 0) + 6
    height = top + down * (tiles[0].height + label + GAP) + bar + len(legend) * LINE + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(titles):
        draw.text((MARGIN, MARGIN + i * LINE), line, fill=INK, font=_font(14))
    if caption:
        draw.text((MARGIN, MARGIN + len(titles) * LINE), caption, fill=PALE_INK, font=_font(12))
    for i, tile in enumerate(tiles):
        x = MARGIN + (i % across) * (tile.width + GAP)
        y = top + (i // across) * (tile.height + label + GAP)
        if label:
            draw.text((x, y), f"frame {shown[i]}", fill=PALE_INK, font=_font(12))
        page.paste(tile, (x, y + label))
    y = top + down * (tiles[0].height + label + GAP)
    if len(outside):
        draw.text((MARGIN, y), f"{len(outside)} text and other tokens", fill=PALE_INK, font=_font(12))
        strip = Image.fromarray(COLOURS[outside][None]).resize((width - 2 * MARGIN, 18), Image.Resampling.NEAREST)
        page.paste(strip, (MARGIN, y + LINE))
    _draw_legend(draw, legend, y + bar)
    return page


def _legend_rows(states: list[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = [[]]
    used = MARGIN
    for s in states:
        need = _legend_width(s)
        if used + need > width - MARGIN and rows[-1]:
            rows.append([])
            used = MARGIN
        rows[-1].append(s)
        used += need
    return rows


def _legend_width(state: int) -> int:
    return 16 + round(_font(12).getlength(NAMES[state])) + GAP + 4


def _draw_legend(draw: ImageDraw.ImageDraw, rows: list[list[int]], y: int) -> None:
    for i, row in enumerate(rows):
        x = MARGIN
        for s in row:
            draw.rectangle(
                [x, y + i * LINE + 2, x + 11, y + i * LINE + 13],
                fill=tuple(int(v) for v in COLOURS[s]),
                outline=PALE_INK,
            )
            draw.text((x + 16, y + i * LINE), NAMES[s], fill=INK, font=_font(12))
            x += _legend_width(s)


def _wrapped(text: str, width: int) -> list[str]:
    lines, font = [""], _font(14)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width - 2 * MARGIN and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()
