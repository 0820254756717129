"""Recommended settings by model and size: what `foveal.preset`, `foveal methods --presets` and docs/presets.md tell.

Letters: s attention's share of the time of a transformer, d density, e speed per pair beside dense (eff), f part of the calls that
run sparse.

Notable choices
- A preset is a config that `foveal run presets/NAME` takes; its first method is the recommended one.
- The expected gain is arithmetic on stated figures, not a promise: 1 / (1 - s + s d / e) in a sparse step, 1 / (1 - s f (1 - d / e))
  over a run, transformer only. Text encoder and VAE are not in it.
- Where the share was not timed it is counted in FLOPs, which overstates it; the gain is then "at most".
- Files: presets/*.yaml and presets/cases.json are written by hand; presets/measured.json by benchmarks/tables.py from benchmarks/results.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.pipelines.config import ConfigError, load, shipped_folder
from foveal.pipelines.schema import MethodConfig, StudyConfig
from foveal.plugins.layout import Layout
from foveal.plugins.method import Method, make

HEAD = ("preset", "size", "method", "density", "attention's share", "sparse step", "whole run", "free attention")


def preset(name: str, method: str | None = None) -> dict[str, Any]:
    """Arguments for ``foveal.accelerate``: ``accelerate(pipe, **preset("wan-1.3b-480p"))``.

    method  another method of the preset than its first, by name
    Raises ``ConfigError`` for a preset or method that there is not.
    """
    chosen = entry(study_of(name), name, method)
    return {"method": chosen.name, **chosen.knobs}


def names() -> list[str]:
    """Every preset, by name."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def folder() -> Path:
    return shipped_folder() / "presets"


def study_of(name: str) -> StudyConfig:
    """The run config of a preset."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(names())}.{hint}")
    return load(folder() / f"{name}.yaml").studies[0]


def entry(study: StudyConfig, name: str, method: str | None) -> MethodConfig:
    """A method of a preset: the first, or the one of that name."""
    known = [entry.name for entry in study.methods]
    if method is not None and method not in known:
        raise ConfigError(f"the preset {name} has no method {method!r}; it has {', '.join(known)}.")
    return study.methods[0 if method is None else known.index(method)]


# ---- what is known of a case
@dataclass(frozen=True)
class Case:
    """The attention calls of one model at one size. Tokens: grid and joint text; depth: attention layers that may run sparse."""

    grid: tuple[int, ...]
    text: int
    text_first: bool
    heads: int
    head_dim: int
    depth: int

    @property
    def layout(self) -> Layout:
        return Layout.joint(self.grid, self.text, self.text_first)


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from. measured: timed by this project; upper: true figures lie below."""

    value: float
    source: str
    measured: bool = False
    upper: bool = False


def facts() -> dict[str, Any]:
    """cases.json, with what was measured under "measured"."""
    known = json.loads((folder() / "cases.json").read_text())
    measured = folder() / "measured.json"
    return known | {"measured": json.loads(measured.read_text()) if measured.is_file() else {"share": {}, "eff": {}}}


def case_of(name: str) -> Case:
    known = facts()["cases"][name]
    return Case(tuple(known["grid"]), *(known[key] for key in ("text", "text_first", "heads", "head_dim", "depth")))


def share_of(name: str) -> Figure:
    """Attention's share of the transformer: timed if it was, else as a paper reports it, else in FLOPs."""
    known = facts()
    timed = known["measured"]["share"].get(known["cases"][name].get("measured_as", name))
    if timed is not None:
        return Figure(timed["value"], timed["source"], measured=True)
    case = known["cases"][known["cases"][name].get("measured_as", name)]
    if "share" in case:
        source = case["share"]["source"]
        return Figure(case["share"]["value"], source, measured=not source.startswith("reported"))
    return Figure(case["flop_share"], "share of the FLOPs, not of the time", upper=True)


def eff_of(head_dim: int) -> Figure:
    """Speed per pair of our kernel beside dense attention at the nearest head dim that was measured, above it first."""
    known = facts()
    figures = {int(k): v for k, v in {**known["eff"], **known["measured"]["eff"]}.items()}
    nearest = min(figures, key=lambda dim: (dim < head_dim, abs(dim - head_dim)))
    return Figure(figures[nearest]["value"], figures[nearest]["source"], measured=True)


# ---- what to expect
@dataclass(frozen=True)
class Gain:
    """Expected speed-up of the transformer. step: one sparse step; run: all steps and layers; limit: were attention free."""

    density: float
    share: Figure
    eff: Figure
    sparse_part: float

    @property
    def step(self) -> float:
        return 1 / (1 - self.share.value + self.share.value * self.density / self.eff.value)

    @property
    def run(self) -> float:
        return 1 / (1 - self.share.value * self.sparse_part * (1 - self.density / self.eff.value))

    @property
    def limit(self) -> float:
        return 1 / (1 - self.share.value)


def expected(name: str, method: str | None = None) -> Gain:
    """The gain of a preset from its density on its grid and the shares and speeds on file."""
    study = study_of(name)
    return gain_of(name, study, entry(study, name, method))


def gain_of(name: str, study: StudyConfig, chosen: MethodConfig) -> Gain:
    made, case = make(chosen.name, **chosen.knobs), case_of(name)
    steps = study.sampler.steps
    if steps is None:
        raise ConfigError(f"the preset {name} gives no sampler.steps; the gain of a run needs them.")
    layers = {i % case.depth for i in made.dense_layers}
    part = (1 - made.first_sparse_step(steps) / steps) * (1 - len(layers) / case.depth)
    return Gain(plan_of(made, case).density, share_of(name), eff_of(case.head_dim), part)


def plan_of(method: Method, case: Case) -> Any:
    """The plan of a static method on the case's whole sequence."""
    return method.static_plan(case.layout).plan  # type: ignore[attr-defined]


# ---- lists
def preset_rows() -> list[dict[str, Any]]:
    """One row per method of every preset, as plain data."""
    studies = {name: load(folder() / f"{name}.yaml").studies[0] for name in names()}
    return [row(name, study, chosen) for name, study in studies.items() for chosen in study.methods]


def row(name: str, study: StudyConfig, chosen: MethodConfig) -> dict[str, Any]:
    gain, known = gain_of(name, study, chosen), facts()["cases"][name]
    return {
        "name": name, "title": study.title, "grid": known["grid"], "text": known["text"], "method": chosen.name,
        "label": chosen.label, "knobs": dict(chosen.knobs), "density": gain.density, "share": gain.share.value,
        "share_source": gain.share.source, "share_measured": gain.share.measured, "share_upper": gain.share.upper,
        "eff": gain.eff.value, "eff_source": gain.eff.source, "step_gain": gain.step, "run_gain": gain.run, "limit": gain.limit,
        "little": bool(known.get("little")),
    }  # fmt: skip


def cells(row: dict[str, Any], mark: str = "†") -> list[str]:
    """A row as text, in the order of HEAD; ``mark`` stands at shares that are FLOPs."""
    bound = "at most " if row["share_upper"] else ""
    run = f"{bound}{row['run_gain']:.2f}x" + (" (little or none)" if row["little"] else "")
    share = f"{row['share']:.2f}{mark if row['share_upper'] else ''}"
    return [
        row["name"], row["title"], row["label"] or row["method"], f"{row['density']:.3f}", share,
        f"{bound}{row['step_gain']:.2f}x", run, f"{row['limit']:.2f}x",
    ]  # fmt: skip


def print_presets(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=box.MARKDOWN)
    for head in HEAD:
        table.add_column(head, no_wrap=head in ("preset", "method"))
    for r in rows:
        table.add_row(*map(Text, cells(r)))
    console.print(table)
    console.print(
        "\nGains are expected for the transformer alone, from attention's share of its time and measured kernel speed.\n"
        "† a share of the FLOPs, which overstates the share of the time. --json names every source.\n"
        'Use: foveal run presets/NAME model=PATH, or foveal.accelerate(pipe, **foveal.preset("NAME")).',
        markup=False,
    )
