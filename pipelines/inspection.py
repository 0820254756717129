"""`foveal inspect`: the plan of every method of a config, as a picture on the token grid, as one line, and layer by layer.

Notable choices
- The model runs for one step (all of them when a method keeps first steps dense), so that what is shown is what happens: a
  plan that depends on q and k is made from real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.pipelines.config import load
from foveal.pipelines.contestants import Contestant, contestants
from foveal.pipelines.errors import UserError
from foveal.pipelines.generator import Generator, load_generator
from foveal.pipelines.observe import attached, capture_call
from foveal.pipelines.progress import Voice
from foveal.pipelines.samples import atomic
from foveal.pipelines.schema import StudyConfig
from foveal.plugins.method import make
from foveal.plugins.record import Capture
from foveal.plugins.site import State


def inspect_config(source: str, overrides: Sequence[str], out: Path, voice: Voice) -> dict[str, Any]:
    """Look at every study of a config.

    -> {"studies": [{"id", "model", "call", "methods": [{"id", "label", "plan", "density", "visited", "pictures", "layers"}]}]}
    Pictures go to `out` as PNG files named after the study and the method.
    """
    experiment = load(source, overrides)
    studies = []
    for study in experiment.studies:
        voice.say(f"loading {study.model}")
        generator = load_generator(study)
        call = capture_call(generator, make("dense"), study.prompts[0], study.seeds[0])
        if call is None:
            raise UserError(f"{study.model} has no attention layer that methods could take over.")
        entrants = [c for c in contestants(study, []) if not c.is_dense]
        prefix = "" if experiment.single else f"{study.id}-"
        rows = []
        with voice.bar("methods", len(entrants)) as tick:
            for contestant in entrants:
                rows.append(inspect_method(generator, study, contestant, call, out, prefix))
                tick(contestant.label)
        grid, tokens = list(call.site.grid), int(call.q.shape[2])
        studies.append(
            {
                "id": study.id,
                "model": study.model,
                "call": {"grid": grid, "tokens": tokens, "layer": call.site.name},
                "methods": rows,
            }
        )
    return {"studies": studies}


def inspect_method(
    generator: Generator, study: StudyConfig, contestant: Contestant, call: Capture, out: Path, prefix: str
) -> dict[str, Any]:
    """One method: its plan for the captured call, pictures of it, and what it did in every layer."""
    method = contestant.method
    plan = method.plan(call.q, call.k, call.v, call.site, State())
    row: dict[str, Any] = {
        "id": contestant.id,
        "label": contestant.label,
        "plan": None,
        "density": 1.0,
        "visited": 1.0,
        "pictures": [],
    }
    if plan is not None:
        row |= {"plan": str(plan), "density": plan.density, "visited": plan.visited}
        row["pictures"] = [str(path) for path in draw(plan, call, out, prefix + contestant.id, contestant.label)]
    with attached(generator, method) as handle:
        generator.sample([study.prompts[0]], [study.seeds[0]], steps=generator.steps if method.dense_steps else 1)
        row["layers"] = [{k: v for k, v in layer.items() if k != "plan"} for layer in handle.record.table()]
        row["ran_dense"] = handle.record.ran_dense_why()
    return row


def draw(plan: Any, call: Capture, out: Path, name: str, label: str) -> list[Path]:
    """The plan on its grid and its block map, as PNG files."""
    from foveal.plugins.plans.picture import draw_block_map, draw_plan

    pictures = {
        out / f"{name}.png": draw_plan(
            plan.to("cpu"), call.site.grid, visual=call.site.visual, max_frames=24, title=label
        ),
        out / f"{name}-blocks.png": draw_block_map(plan.to("cpu"), title=label),
    }
    try:
        for path, image in pictures.items():
            atomic(path, partial(image.save, format="PNG"))
    except OSError as err:
        raise UserError(f"cannot write pictures into {out} ({err.strerror}); give another folder with --out.") from err
    return list(pictures)


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """Plans as lines, layers as Markdown tables."""
    for study in found["studies"]:
        call = study["call"]
        say(
            console,
            f"### {study['model']}: {call['tokens']:,} tokens, grid {' x '.join(map(str, call['grid']))}, seen at {call['layer']}",
        )
        for method in study["methods"]:
            say(console, "", f"**{method['label']}**", method["plan"] or "no plan: this call runs dense")
            say(console, *(f"picture: {path}" for path in method["pictures"]))
            console.print(layer_table(method["layers"]))
            for entry in method["ran_dense"]:
                names = entry["layers"]
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                say(console, f"dense, {entry['reason']}: {', '.join(names[:3])}{more}")
        say(console, "")


def layer_table(layers: list[dict[str, Any]]) -> Table:
    """One row a layer that ran."""
    table = Table(box=box.MARKDOWN)
    for head in ("layer", "role", "kernel", "density", "visited", "calls", "dense calls", "ms"):
        table.add_column(head, justify="left" if head in ("layer", "role", "kernel") else "right", no_wrap=True)
    for row in layers:
        if row["calls"]:
            numbers = ["–" if row[k] is None else f"{row[k]:.3f}" for k in ("density", "visited")]
            counts = [str(row["calls"]), str(row["dense_calls"]), f"{1000 * row['seconds'] / row['calls']:.1f}"]
            table.add_row(*map(Text, (row["name"], row["role"], row["implementation"] or "–", *numbers, *counts)))
    return table


def say(console: Console, *texts: str) -> None:
    """Plain lines, wrapped by the terminal and not by us."""
    for text in texts:
        console.print(text, markup=False, soft_wrap=True)
