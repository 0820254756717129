"""A model's card: README.md, written from the log of its training run and nothing else.

A log is a list of rows, dictionaries with an "event": start, train, eval, real, final, done.
"""

from __future__ import annotations

from collections.abc import Sequence

from foveal.pipelines.card_text import Row, last, show, span, table
from foveal.pipelines.world.models import TOY, ModelSpec
from foveal.pipelines.world.prompts import HELD_OUT_TRIPLES
from foveal.pipelines.world.training import Recipe
from foveal.pipelines.world.vocabulary import FIELDS

ONE_OBJECT = """\
- One object. The slots of a second one exist in the vocabulary and were null throughout training.
- With one object every attribute saturates: accuracies at 1.0 cannot rank attention methods. Rank them by world_psnr,
  jitter and fidelity to the dense sample.
- Large objects that move along an axis are cut by the border, in training and in samples.
- Made for its own clip size; at other sizes quality is not to be expected.
"""

TWO_OBJECTS = """\
- One or two objects, never three; two objects have different colours. Which one lies in front where they cross is not
  scored.
- Accuracies near 1.0 cannot rank attention methods. Rank them by the two-object accuracies, world_psnr, jitter and
  fidelity to the dense sample.
- Made for the sizes above; at others quality is not to be expected.
"""

LIMITS = """\
- The reader knows eight colours and eight directions, so near-misses count as right.
- One training run with one seed: nothing is known about the spread between runs.
- Pixels in patches of 4 x 4 instead of latents: tile seams show more than in large latent models.
- Numbers of this model are never numbers of Wan or any other large model."""


def card(spec: ModelSpec, recipe: Recipe, rows: Sequence[Row], params: int, commands: Sequence[str]) -> str:
    """Markdown: what the model is, its data, recipe, commands, curve, metrics beside real clips, and limits."""
    sections = [
        f"# {spec.id}\n\n{TOY[0].upper()}{TOY[1:]}.\n\n{_facts(spec, params)}",
        f"## Data\n\n{_data(spec, recipe)}",
        f"## Recipe\n\n{_recipe(recipe, rows)}\n\n```\n" + "\n".join(commands) + "\n```",
        f"## Curve\n\n{_curve(rows)}",
        f"## Metrics\n\n{_metrics(rows) if spec.world == 1 else examined(spec, rows)}",
        f"## Limits\n\n{ONE_OBJECT if spec.objects == 1 else TWO_OBJECTS}{LIMITS}",
        "## Licence\n\nApache-2.0, weights included. The training data is rendered by foveal itself.",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(spec: ModelSpec, params: int) -> str:
    net = spec.transformer
    rows = [
        ("class", f"diffusers `WanTransformer3DModel`, patches {tuple(net['patch_size'])} of pixels, no VAE"),
        ("parameters", f"{params:,}, fp16 file, meant for fp32 use"),
        ("layers, heads", f"{net['num_layers']}, {net['num_attention_heads']} x {net['attention_head_dim']}"),
        ("clip, tokens", f"{spec.frames} x {spec.size} x {spec.size}, {spec.tokens:,} ({_times(spec.grid)})"),
        ("sampler", f"Euler, {spec.steps} steps, guidance {spec.guidance:g}, shift {spec.shift:g}"),
        *[("objects", "1 or 2")] * (spec.objects > 1),
        *[(f"at {size} px", f"shift {shift:g}") for size, shift in spec.shifts],
    ]
    return table(("", ""), rows)


def _data(spec: ModelSpec, recipe: Recipe) -> str:
    count = " x ".join(f"{len(words)} {field}s" for field, words in FIELDS.items())
    held = "; ".join(" ".join(triple) for triple in sorted(HELD_OUT_TRIPLES))
    size = " or ".join(map(str, spec.sizes))
    things = f"one object, {count}" if spec.objects == 1 else f"one or two objects of different colours, {count}"
    paths = "" if spec.world == 1 else " Objects stay inside the frame and may cross, the second over the first."
    return (
        f"A procedural world (`foveal/pipelines/world/render.py`, version {spec.world}), rendered during training at "
        f"{recipe.frames} frames of {size} pixels squared: {things}.{paths} No clip is seen twice.\n\n"
        f"Held out of training, {len(HELD_OUT_TRIPLES)} of 360 (colour, shape, motion) triples, of either object: {held}."
    )


def _recipe(recipe: Recipe, rows: Sequence[Row]) -> str:
    start, done = last(rows, "start"), last(rows, "done")
    return (
        f"Flow matching (velocity, unweighted), AdamW (.9, .98), peak learning rate {recipe.lr:g}, warm-up "
        f"{recipe.warmup} steps, linear decay to 2 % over the last {recipe.decay:.0%}, weight decay "
        f"{recipe.weight_decay:g}, gradient norm {recipe.clip:g}, {_shapes(recipe)}, weights averaged at "
        f"{recipe.ema:g}, prompts dropped {recipe.dropout:.0%}; noise levels: {1 - recipe.high:.0%} logit-normal with "
        f"the shift, {recipe.high:.0%} uniform in [.9, 1]. Seed {recipe.seed}.\n\n"
        f"{done.get('step', 0):,} steps, {done.get('clips', 0):,} clips, {done.get('seconds', 0):.0f} s on "
        f"{start.get('device', 'an unknown device')}, torch {start.get('torch', 'unknown')}."
    )


def _shapes(recipe: Recipe) -> str:
    if not recipe.stages:
        return f"batch {recipe.batch}, shift {recipe.shift:g}"
    stages = []
    for stage in recipe.stages:
        shapes = (f"{s.share:.0%} {s.size} px (batch {s.batch}, shift {s.shift:g})" for s in stage.shapes)
        stages.append(f"up to {stage.until:.0%} of the time {' and '.join(shapes)}, {stage.pairs:.0%} with two objects")
    return "steps drawn at random, " + "; ".join(stages)


def _curve(rows: Sequence[Row]) -> str:
    rates = [f"acc_{name}" for name in ("colour", "size", "shape", "motion", "scene", "all")]
    picked = [row for row in rows if row["event"] == "eval"]
    kind = ["group", "size"] if any("group" in row for row in picked) else []
    names = ["seconds", "clips", "loss", *kind, *rates, "world_psnr", "jitter"]
    if not picked:
        return "No evaluation was made during training."
    return table(names, [[show(row.get(name)) for name in names] for row in picked])


def _metrics(rows: Sequence[Row]) -> str:
    names = ("acc_all", "95 % interval", "world_psnr", "jitter", "angle error")
    body = []
    for row in rows:
        if row["event"] not in ("real", "final"):
            continue
        label = "real clips (upper bound)" if row["event"] == "real" else _setting(row)
        values = [show(row["acc_all"]), span(row["acc_all_ci95"]), *(show(row.get(n)) for n in _UNSATURATED)]
        body.append([label, str(row["n"]), *values])
    note = "Averaged weights; all six attributes right (Wilson interval), dB, fraction of the frame, degrees.\n\n"
    return note + table(("clips", "n", *names), body)


def examined(spec: ModelSpec, rows: Sequence[Row]) -> str:
    """The final examination: model beside real clips, by size and kind of prompt; then the gates."""
    done = max((i for i, row in enumerate(rows) if row["event"] == "done"), default=0)
    names = ("all right", "95 %, clips", "95 %, prompts", "colour", "shape", "size", "motion", "scene", "dB", "jitter",
             "degrees", "travel")  # fmt: skip
    body = []
    for row in (row for row in rows[done:] if row["event"] in ("final", "real")):
        label = "real clips (upper bound)" if row["event"] == "real" else f"{row['steps']} steps"
        rates = [show(row[f"acc_{field}"]) for field in ("colour", "shape", "size", "motion", "scene")]
        rest = [show(row[name]) for name in ("world_psnr", "jitter", "angle_error", "displacement")]
        intervals = [span(row[name]) for name in ("acc_all_ci95", "acc_all_prompts_ci95")]
        where = [f"{row['group']}, {row['size']} px", label, f"{row['prompts']} x {row['seeds']}"]
        body.append([*where, show(row["acc_all"]), *intervals, *rates, *rest])
    gates = "; ".join(f"{group}: {metric} at least {least:g}" for group, metric, least in spec.gates)
    return (
        "Averaged weights, guidance 1, fixed prompts x seeds. An attribute is right if every object asked for has it. Wilson's "
        "interval over clips takes them as independent; the one over prompts is a bootstrap and shrinks to a point at 1. "
        f"Travel is the displacement of what moves.\n\n{table(('prompts', 'clips', 'n', *names), body)}\n\n"
        f"Gates, at {spec.size} px: {gates}."
    )


_UNSATURATED = ("world_psnr", "jitter", "angle_error")


def _setting(row: Row) -> str:
    kind = "held-out triples" if row["held_out"] else "seen triples"
    return f"{kind}, {row['steps']} steps, guidance {row['guidance']:g}"


def _times(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))
