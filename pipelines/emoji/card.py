"""The emoji model's card: README.md, written from the log of its training run and nothing else.

A log is a list of rows, dictionaries with an "event": start, train, eval, real, final, done.
"""

from __future__ import annotations

from collections.abc import Sequence

from foveal.pipelines.card_text import Row, last, show, span, table
from foveal.pipelines.emoji.models import TOY, EmojiSpec
from foveal.pipelines.emoji.pictures import NAMES
from foveal.pipelines.emoji.scenes import ONE_IN, PAIRS
from foveal.pipelines.emoji.vocabulary import BACKGROUNDS, CANVASES, GRAMMAR, STYLES
from foveal.pipelines.world.training import Recipe

LIMITS = """\
- It knows its {pictures} pictures by heart and nothing else; what has to generalise is their composition: which picture,
  which place, which scale, on which background.
- Scales are two, positions lie on 1/64 of the frame, pictures are never rotated, mirrored or occluded.
- The reader knows the finite list only, so near-misses count as right; emoji_psnr does not saturate.
- Trained at {sizes} pixels; at other sizes quality is not to be expected, and those runs say so.
- One training run with one seed: nothing is known about the spread between runs.
- Pixels in patches of 4 x 4 instead of latents: tile seams show more than in large latent models.
- Numbers of this model are never numbers of Flux or any other large model."""

ATTRIBUTION = (
    "Apache-2.0, weights included. The pictures are the bitmaps of Noto Color Emoji (copyright 2013-2017 Google Inc. and "
    "Arjen Nienhuis; images Apache-2.0, font SIL Open Font License 1.1), cut out of Debian's `fonts-noto-color-emoji` "
    "2.042; the font itself is not shipped."
)
RATES = ("object", "pair", "relation", "scale", "scene", "all")


def card(spec: EmojiSpec, recipe: Recipe, rows: Sequence[Row], params: int, commands: Sequence[str]) -> str:
    """Markdown: what the model is, its data, recipe, commands, curve, metrics beside rendered scenes, and limits."""
    limits = LIMITS.format(pictures=len(NAMES), sizes=", ".join(map(str, CANVASES)))
    sections = [
        f"# {spec.id}\n\n{TOY[0].upper()}{TOY[1:]}.\n\n{_facts(spec, params)}",
        f"## Data\n\n{_data()}",
        f"## Recipe\n\n{_recipe(recipe, rows)}\n\n```\n" + "\n".join(commands) + "\n```",
        f"## Curve\n\n{_curve(rows)}",
        f"## Metrics\n\n{_metrics(rows)}",
        f"## Limits\n\n{limits}",
        f"## Licence\n\n{ATTRIBUTION}",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(spec: EmojiSpec, params: int) -> str:
    net = spec.transformer
    shifts = ", ".join(f"{shift:g} at {size} px" for size, shift in spec.shifts.items())
    tokens = ", ".join(f"{size} px: {(size // 4) ** 2:,}" for size in CANVASES)
    rows = [
        ("class", "diffusers `FluxTransformer2DModel`, tokens are patches of 4 x 4 pixels, no VAE"),
        ("parameters", f"{params:,}, fp16 file, meant for fp32 use"),
        (
            "blocks, heads",
            f"{net['num_layers']} double, {net['num_single_layers']} single; "
            f"{net['num_attention_heads']} x {net['attention_head_dim']}",
        ),
        ("trained sizes, image tokens", tokens),
        ("sampler", f"Euler, {spec.steps} steps, guidance {spec.guidance:g}, shift {shifts}"),
        ("prompts", f"`{GRAMMAR.replace('|', ', ')}`"),
    ]
    return table(("", ""), rows)


def _data() -> str:
    return (
        f"Scenes composed during training (`foveal/pipelines/emoji/render.py`) from {len(NAMES)} pictures of Noto Color "
        f"Emoji (`assets/emoji-pictures/sheet.png`, names in `foveal/pipelines/emoji/pictures.py`): one picture "
        f"({1 - PAIRS:.0%} of scenes) or two with a relation, two scales, {len(BACKGROUNDS)} backgrounds, {len(STYLES)} "
        f"styles. Held out of training: one in {ONE_IN} (picture, background) pairs and one in {ONE_IN} (picture, relation, "
        "picture) triples, by a fixed hash (`foveal.pipelines.emoji.scenes.held_out`)."
    )


def _recipe(recipe: Recipe, rows: Sequence[Row]) -> str:
    start, done = last(rows, "start"), last(rows, "done")
    shapes = sorted({(shape.size, shape.batch, shape.shift) for part in recipe.stages for shape in part.shapes})
    batches = ", ".join(f"{batch} at {size} px" for size, batch, _ in shapes)
    shifts = ", ".join(f"{shift:g} at {size} px" for size, _, shift in shapes)
    seen = ", ".join(f"{int(n):,} at {size} px" for size, n in done.get("seen", {}).items())
    stages = "; ".join(
        f"until {part.until:.0%}: " + ", ".join(f"{shape.share:.0%} at {shape.size} px" for shape in part.shapes)
        for part in recipe.stages
    )
    return (
        f"Flow matching (velocity, unweighted), AdamW (.9, .98), peak learning rate {recipe.lr:g}, warm-up "
        f"{recipe.warmup} steps, linear decay to 2 % over the last {recipe.decay:.0%}, weight decay "
        f"{recipe.weight_decay:g}, gradient norm {recipe.clip:g}, batch {batches}, weights averaged at {recipe.ema:g}, "
        f"prompts dropped {recipe.dropout:.0%}; noise levels: {1 - recipe.high:.0%} logit-normal with shift {shifts}, "
        f"{recipe.high:.0%} uniform in [.9, 1]. Share of steps {stages}. Seed {recipe.seed}.\n\n"
        f"{done.get('step', 0):,} steps, samples {seen or 'none'}, {done.get('seconds', 0):.0f} s on "
        f"{start.get('device', 'an unknown device')}, torch {start.get('torch', 'unknown')}, commit "
        f"{start.get('commit') or 'not recorded'}."
    )


def _curve(rows: Sequence[Row]) -> str:
    names = ["seconds", "step", "size", "loss", *(f"acc_{name}" for name in RATES), "emoji_psnr"]
    picked = [row for row in rows if row["event"] == "eval"]
    if not picked:
        return "No evaluation was made during training."
    return table(names, [[show(row.get(name)) for name in names] for row in picked])


def _metrics(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["event"] not in ("real", "final"):
            continue
        label = "rendered scenes (upper bound)" if row["event"] == "real" else _setting(row)
        rates = [show(row[f"acc_{name}"]) for name in RATES]
        ends = [span(row["acc_all_ci95"]), show(row["emoji_psnr"]), span(row["emoji_psnr_ci95"], 1)]
        body.append([label, f"{row['size']} px", f"{row['prompts']} x {row['seeds']}", *rates, *ends])
    note = (
        "Averaged weights. Rates by the exact reader; `all` is everything asked for, its interval Wilson's over prompts; "
        "emoji_psnr in dB, interval by bootstrap over prompts.\n\n"
    )
    header = ("images", "size", "prompts x seeds", *RATES, "95 % of all", "emoji_psnr", "95 %")
    return note + table(header, body)


def _setting(row: Row) -> str:
    kind = "held-out combinations" if row["held_out"] else "seen combinations"
    return f"{kind}, {row['steps']} steps, guidance {row['guidance']:g}"
