"""LINA's card: README.md, written from the log of its training run and nothing else.

A log is a list of rows, dictionaries with an "event": start, train, judge, eval, real, final, copies, done.
"""

from __future__ import annotations

from collections.abc import Sequence

from foveal.pipelines.card_text import Row, last, show, span, table
from foveal.pipelines.lina.models import LinaSpec, Recipe

LIMITS = """\
- {note}.
- The judge is ours, trained on the same data: its accuracy and its features' distance compare these samples with each other and with
  real pictures, and with no published number. It can be wrong, and samples that fool it count as right.
- The published figures of LINA (ImageNet, 256 x 256 and more) belong to models with up to seven hundred times the parameters.
- One training run with one seed: nothing is known about the spread between runs.
- Classes only, no text; one size."""

SOURCES = {
    "fashion": (
        "Fashion-MNIST (Xiao, Rasul, Vollgraf: \"Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms\"): "
        "60,000 grey pictures of 28 x 28 pixels to train on, 10,000 to compare with, ten classes. Copyright 2017 Zalando SE, MIT licence. "
        "The pictures themselves are not shipped."
    ),
    "digits": "The 8 x 8 digits inside scikit-learn (1,797 pictures); one in six is kept for comparison.",
    "tiny": "Four shapes drawn by the program, for tests.",
}  # fmt: skip


def card(
    spec: LinaSpec, recipe: Recipe, classes: Sequence[str], rows: Sequence[Row], params: int, commands: Sequence[str]
) -> str:
    """Markdown: what the model is, its data, recipe, commands, curve, metrics beside real pictures, and limits."""
    note = spec.note[0].upper() + spec.note[1:]
    sections = [
        f"# {spec.id}\n\n{note}.\n\n{_facts(spec, classes, params)}",
        f"## Data\n\n{SOURCES[spec.data]}",
        f"## Recipe\n\n{_recipe(recipe, rows)}\n\n```\n" + "\n".join(commands) + "\n```",
        f"## Curve\n\n{_curve(rows)}",
        f"## Metrics\n\n{_metrics(rows, classes)}",
        f"## Limits\n\n{LIMITS.format(note=note)}",
        "## Licence\n\nApache-2.0, weights included.",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(spec: LinaSpec, classes: Sequence[str], params: int) -> str:
    c = spec.config
    rows = [
        ("class", "`foveal.vision.lina.LinaModel`: masked autoregressive, linear attention with gated keys and values, continuous tokens"),
        ("parameters", f"{params:,}, fp16 file, meant for fp32 use"),
        ("width, heads", f"{c.dim}, {c.heads}"),
        ("blocks", f"connector {c.connector_depth}, encoder {c.encoder_depth}, decoder {c.decoder_depth}, head {c.head_depth}"),
        ("tokens", f"{c.tokens} of {c.patch} x {c.patch} pixels, {c.queries} queries; no VAE"),
        ("pictures", f"{spec.size} x {spec.size}, grey, computed as {c.side} x {c.side}"),
        (
            "sampler",
            f"{spec.steps} steps, {spec.flow_steps} flow steps a token, guidance rising from {spec.min_guidance:g} to {spec.guidance:g}",
        ),
        ("classes", ", ".join(classes)),
    ]  # fmt: skip
    return table(("", ""), rows)


def _recipe(recipe: Recipe, rows: Sequence[Row]) -> str:
    start, done = last(rows, "start"), last(rows, "done")
    steps = done.get("step", 0)
    return (
        f"Flow matching of hidden tokens, {recipe.draws} noise levels each (logistic-normal). Hidden share: normal around 1 with deviation "
        f"{recipe.mask_std:g}, between {recipe.mask_low:g} and 1. AdamW (.9, .95), peak learning rate {recipe.lr:g}, warm-up {recipe.warmup} "
        f"steps, linear decay to 2 % over the last {recipe.decay:.0%}, weight decay {recipe.weight_decay:g}, gradient norm {recipe.clip:g}, "
        f"batch {recipe.batch}, weights averaged at {recipe.ema:g}, class dropped {recipe.dropout:.0%}, no augmentation. Seed {recipe.seed}.\n\n"
        f"{steps:,} steps, {steps * recipe.batch:,} pictures, {done.get('seconds', 0):.0f} s on {start.get('device', 'an unknown device')}, "
        f"torch {start.get('torch', 'unknown')}, commit {start.get('commit') or 'not recorded'}."
    )


def _curve(rows: Sequence[Row]) -> str:
    picked = [row for row in rows if row["event"] == "eval"]
    if not picked:
        return "No evaluation was made during training."
    names = ("seconds", "step", "loss", "samples", "guidance", "accuracy", "distance")
    return table(names, [[show(row.get(name)) for name in names] for row in picked])


def _metrics(rows: Sequence[Row], classes: Sequence[str]) -> str:
    judge = last(rows, "judge")
    body, first = [], None
    for row in rows:
        if row["event"] not in ("real", "final"):
            continue
        real = row["event"] == "real"
        what = (
            "real pictures the judge never saw"
            if real
            else f"{row['steps']} x {row['flow_steps']} steps, guidance {row['guidance']:g}"
        )
        cells = [
            what,
            f"{row['samples']:,}",
            show(row["accuracy"]),
            span(row["accuracy_ci95"]),
            show(row["distance"]),
            span(row["distance_ci95"]),
        ]
        body.append(cells)
        first = first or (None if real else row)
    note = (
        f"The feature network is ours: a convolutional classifier ({judge.get('params', 0):,} parameters, `judge.safetensors`) trained in the "
        f"same run on five sixths of the training pictures; it is right on {judge.get('accuracy', 0):.1%} of the test pictures. `accuracy`: share "
        "of samples it takes for the class asked for (95 % Wilson). `distance`: Fréchet distance between normal distributions fitted to its 64 "
        f"features of a batch and of all test pictures; mean over {first['batches'] if first else 0} batches with seeds of their own (95 %, Student's "
        "t, the test pictures held fixed). It is not FID: that needs another network. Guidance rises from "
        f"{show(first['min_guidance']) if first else 1} to the value named. Averaged weights, fp32.\n\n"
    )  # fmt: skip
    parts = [note + table(("pictures", "number", "accuracy", "95 %", "distance", "95 %"), body)]
    if first:
        shares = [show(x) for x in first["by_class"]]
        parts.append("Accuracy by class, first setting:\n\n" + table(list(classes), [shares]))
    if copies := last(rows, "copies"):
        parts.append(
            f"Copies: the nearest training picture is {copies['sampled']:.3g} away from a sample and {copies['real']:.3g} from a test picture "
            f"(root mean square of grey values in [0, 1], median of {copies['samples']} each)."
        )
    return "\n\n".join(parts)
