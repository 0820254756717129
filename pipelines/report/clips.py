"""The pictures: synchronised players and a contact sheet, both from the same sprites.

* Each sprite stands once in the page, as a background of one CSS class; the contact sheet shows parts of it without any
  script, the players read it back into canvases. Nothing is embedded twice.
* Difference pictures state their gain.
"""

from __future__ import annotations

from foveal.pipelines.report.media import Reel, Sprite, frame_rate, sample_count
from foveal.pipelines.report.source import Study
from foveal.pipelines.report.table import swatch
from foveal.pipelines.report.words import esc, number, plural, script_json

SHOWN = 6  # frames in a contact sheet


def clips_html(study: Study, reels: list[Reel]) -> str:
    """Style, players, sheets and their data; one sentence where a run kept no media."""
    if not reels:
        return "<p>The run kept no readable frames, so there is nothing to show.</p>"
    rules, data, sheets = [], [], []
    for r, reel in enumerate(reels):
        entries = []
        for c, clip in enumerate(reel.clips):
            name = f"f{study.index}-{r}-{c}"
            rules.append(_rule(name, clip.sprite))
            entry = {
                "label": clip.method.label,
                "colour": clip.method.colour,
                "dense": clip.method.is_dense,
                "sprite": name,
            }
            if clip.difference is not None:
                rules.append(_rule(name + "d", clip.difference))
                entry |= {"difference": name + "d", "psnr": [round(x, 1) for x in clip.psnr or ()]}
            entries.append(entry | _shape(clip.sprite))
        data.append({"title": _title(reel), "gain": reel.gain, "clips": entries})
        sheets.append(_sheet(study, reel, r))
    moving = any(c.sprite.frames > 1 for reel in reels for c in reel.clips)
    payload = script_json({"rate": frame_rate(study), "samples": data})
    return (
        f"<style>{''.join(rules)}</style>{_choice(study, reels)}"
        f'<div class="player" data-player hidden></div>'
        f'<script type="application/json" data-for="player">{payload}</script>'
        f'<h4>{"Frame by frame" if moving else "Side by side"}</h4><p class="legend">{_note(reels)}</p>{"".join(sheets)}'
    )


def _shape(s: Sprite) -> dict[str, int]:
    return {"frames": s.frames, "width": s.width, "height": s.height, "columns": s.columns}


def _rule(name: str, s: Sprite) -> str:
    return f'.{name}{{background-image:url("{s.uri}")}}'


def _title(reel: Reel) -> str:
    seed = f"seed {reel.sample.seed}"
    return f"“{reel.sample.prompt}”, {seed}" if reel.sample.prompt else f"prompt {reel.sample.prompt_index}, {seed}"


def _choice(study: Study, reels: list[Reel]) -> str:
    if len(reels) == 1:
        return f'<p class="prompt">{esc(_title(reels[0]))}</p>'
    options = "".join(f'<option value="{i}">{esc(_title(r))}</option>' for i, r in enumerate(reels))
    count = sample_count(study)
    rest = (
        ""
        if count <= len(reels)
        else f"{len(reels)} of {plural(count, 'sample')} are embedded here; the numbers use all of them."
    )
    return (
        f'<p class="choice"><label>Sample <select data-sample>{options}</select></label> '
        f'<span class="legend">{esc(rest)}</span></p>'
    )  # fmt: skip


def _note(reels: list[Reel]) -> str:
    sprites = [c.sprite for r in reels for c in r.clips]
    first, notes = sprites[0], sorted({s.note for s in sprites})
    text = f"Frames are stored {' or '.join(notes)}, {first.width} × {first.height} pixels, enlarged without smoothing."
    if any(c.difference for r in reels for c in r.clips):
        text += " The difference is the mean absolute difference to dense over RGB times the factor stated: "
        text += "black is identical, pale yellow is the full range divided by that factor, or more."
    return esc(text)


def _picks(frames: int) -> list[int]:
    if frames <= SHOWN:
        return list(range(frames))
    return [round(i * (frames - 1) / (SHOWN - 1)) for i in range(SHOWN)]


def _sheet(study: Study, reel: Reel, r: int) -> str:
    """One row a method: sampled frames, and beside them the same frames of the difference."""
    picks = _picks(reel.clips[0].sprite.frames)
    away = any(c.difference for c in reel.clips)
    over = f"<span>{'pictures' if len(picks) == 1 else 'frames'}</span>"
    over += f"<span>difference to dense ×{reel.gain}</span>" if away else ""
    rows = [f'<div class="row heads" aria-hidden="true"><span></span>{over}</div>']
    if len(picks) > 1:
        heads = f'<span class="cells">{"".join(f"<span>{i}</span>" for i in picks)}</span>' * (2 if away else 1)
        rows.append(f'<div class="row heads" aria-hidden="true"><span></span>{heads}</div>')
    for c, clip in enumerate(reel.clips):
        name = f"f{study.index}-{r}-{c}"
        mean = f"<small>{number(sum(clip.psnr) / len(clip.psnr), 1)} dB</small>" if clip.psnr else ""
        where = f"frames {', '.join(map(str, picks))} of {_title(reel)}"
        cells = _strip(clip.sprite, name, picks, f"{clip.method.label}, {where}")
        if clip.difference is not None:
            label = f"{clip.method.label}, difference to dense times {reel.gain}, {where}"
            cells += _strip(clip.difference, name + "d", picks, label, " diff")
        who = f"{swatch(clip.method)}{esc(clip.method.label)}{mean}"
        rows.append(f'<div class="row"><span class="who">{who}</span>{cells}</div>')
    title = f'<p class="prompt only-static">{esc(_title(reel))}</p>'
    return f'<div class="sheet{" paired" if away else ""}" data-sheet="{r}">{title}{"".join(rows)}</div>'


def _strip(s: Sprite, name: str, picks: list[int], label: str, kind: str = "") -> str:
    cells = "".join(f'<i class="{name}" style="{_part(s, i)}"></i>' for i in picks)
    shape = f"--ratio:{s.width}/{s.height}"
    return f'<span class="cells{kind}" role="img" aria-label="{esc(label)}" style="{shape}">{cells}</span>'


def _part(s: Sprite, i: int) -> str:
    """Background position of frame i in its sprite."""
    rows = -(-s.frames // s.columns)
    y, x = divmod(i, s.columns)
    px = 100 * x / (s.columns - 1) if s.columns > 1 else 0
    py = 100 * y / (rows - 1) if rows > 1 else 0
    return f"background-size:{100 * s.columns}% {100 * rows}%;background-position:{px:.4g}% {py:.4g}%"
