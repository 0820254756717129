"""One study, from config to finished samples: every method on every prompt with every seed, in an order that is fair to all.

Notable choices
- Timed rounds run all methods on the first prompt and seed step by step in turn (A, B, C, A, B, C, ...), each with its own
  copy of the model, so that a busy or throttled machine slows all of them alike; checkpoints too large to copy are timed
  one method after the other. The first round's output is kept as that sample.
- All other samples are generated batch by batch, again with the methods in turn.
- What is finished is skipped: a run that was cut off goes on where it stopped, from its own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from foveal.pipelines.contestants import Contestant, contestants
from foveal.pipelines.errors import UserError
from foveal.pipelines.generator import Clip, Generator, load_generator
from foveal.pipelines.host_info import synchronize
from foveal.pipelines.lockstep import in_turn
from foveal.pipelines.metrics import FunctionMetric, choose, metric
from foveal.pipelines.observe import observe
from foveal.pipelines.progress import Tick, Voice
from foveal.pipelines.samples import Cell, Sample, Store, to_uint8
from foveal.pipelines.schema import StudyConfig
from foveal.pipelines.statistics import seed_of


@dataclass(frozen=True)
class Study:
    """A study ready to run. folder: where its files go. sitting: names this process, so that times can be told apart."""

    config: StudyConfig
    contestants: tuple[Contestant, ...]
    metrics: tuple[FunctionMetric, ...]
    skipped: tuple[dict[str, str], ...]
    generator: Generator
    store: Store
    voice: Voice
    sitting: str

    @property
    def cells(self) -> list[Cell]:
        """Every prompt with every seed, prompt by prompt."""
        return [Cell(p, s) for p in range(len(self.config.prompts)) for s in self.config.seeds]

    @property
    def dense(self) -> Contestant | None:
        return next((c for c in self.contestants if c.is_dense), None)

    @property
    def keeps_latents(self) -> bool:
        return any("latents" in metric.inputs for metric in self.metrics)

    @property
    def seed(self) -> int:
        """Seed of the resampling, from the config."""
        return seed_of(str(self.config))

    def prompt(self, cell: Cell) -> str:
        return self.config.prompts[cell.prompt]


def check_study(config: StudyConfig, *, sweep: bool) -> None:
    """Raise for methods and metrics that cannot be: before any model is loaded."""
    contestants(config, [metric(name) for name in config.metrics], sweep=sweep)


def open_study(config: StudyConfig, folder: Path, voice: Voice, sitting: str, *, sweep: bool) -> Study:
    """Check methods and metrics, then load the model. Raises UserError before anything is generated."""
    check_study(config, sweep=sweep)
    voice.say(f"loading {config.model}")
    generator = load_generator(config)
    kind = generator.facts.get("kind")
    emoji = kind == "emoji"
    chosen, skipped = choose(config.metrics, generator.world and not emoji, emoji, kind == "lina")
    if skipped and config.on_missing == "error":
        names = ", ".join(s["id"] for s in skipped)
        raise UserError(f"metrics: {names} {skipped[0]['reason']}; leave them out, or set on_missing: skip.")
    entrants = contestants(config, chosen, sweep=sweep)
    fingerprint = f"{seed_of([str(config), generator.facts['sha256'], sweep]):016x}"
    return Study(
        config, tuple(entrants), tuple(chosen), tuple(skipped), generator, Store(folder, fingerprint), voice, sitting
    )


# ---- samples
def generate(study: Study) -> None:
    """Make every sample that is not there yet, and every timed round that was not timed yet."""
    time_rounds(study)
    batches = [(c, cells) for cells in batched(study) for c in study.contestants if missing(study, c, cells)]
    with study.voice.bar("samples", len(batches) * study.generator.steps) as tick:
        for contestant, cells in batches:
            cells = missing(study, contestant, cells)
            if cells:
                make_samples(study, contestant, cells, partial(tick, contestant.label))


def batched(study: Study) -> Iterator[list[Cell]]:
    """The cells in batches; the first cell is alone when it is timed."""
    cells = study.cells
    first = [cells[:1]] if study.config.rounds else []
    rest = cells[len(first) :]
    yield from first
    for i in range(0, len(rest), study.config.batch):
        yield rest[i : i + study.config.batch]


def missing(study: Study, contestant: Contestant, cells: Sequence[Cell]) -> list[Cell]:
    """The cells this method has no sample of."""
    return [cell for cell in cells if not study.store.has(contestant.id, cell)]


# ---- timed rounds
def round_key(contestant: Contestant, number: int) -> str:
    return f"round-{contestant.id}-{number}"


def untimed(study: Study, number: int) -> list[Contestant]:
    """The methods that a round still lacks."""
    return [c for c in study.contestants if study.store.noted(round_key(c, number)) is None]


def time_rounds(study: Study) -> None:
    """Time the first sample with every method, round by round, all methods of a round step by step in turn."""
    todo = {number: lacking for number in range(study.config.rounds) if (lacking := untimed(study, number))}
    names = {c.id: c for lacking in todo.values() for c in lacking}
    if not todo:
        return
    copies = study.generator.copies(len(names))
    generators = dict(zip(names, copies or [study.generator] * len(names), strict=True))
    cell = study.cells[0]
    warm_up = [] if study.generator.device.type == "cpu" else list(names.values())  # the captured call has warmed a CPU
    total = sum(map(len, todo.values())) * study.generator.steps + len(warm_up)
    with study.voice.bar("timed rounds", total) as tick:
        for contestant in warm_up:
            observe(generators[contestant.id], contestant.method, [study.prompt(cell)], [cell.seed], steps=1)
            tick(f"warming up {contestant.label}")
        for number, lacking in todo.items():
            runs = [partial(timed_run, study, generators[c.id], c, number, tick) for c in lacking]
            if copies:
                in_turn(runs)
            else:
                for run in runs:
                    run(lambda: None, lambda: 0.0)


def timed_run(
    study: Study, generator: Generator, contestant: Contestant, number: int, tick: Tick,
    hand_on: Callable[[], None], waited: Callable[[], float],
) -> None:  # fmt: skip
    """One timed sample of the first cell; the first round's output becomes the sample."""
    cell = study.cells[0]

    def on_step() -> None:
        synchronize(generator.device)
        tick(contestant.label)
        hand_on()

    clip, seen = observe(
        generator, contestant.method, [study.prompt(cell)], [cell.seed], on_step=on_step, waited=waited
    )
    if not study.store.has(contestant.id, cell):
        study.store.save(contestant.id, cell, sample_of(study, clip, 0, seen))
    study.store.note(round_key(contestant, number), {**seen, "sitting": study.sitting})


# ---- the rest
def make_samples(study: Study, contestant: Contestant, cells: Sequence[Cell], tick: Callable[[], None]) -> None:
    """Generate a batch and keep each sample as soon as it is whole."""
    prompts, seeds = [study.prompt(cell) for cell in cells], [cell.seed for cell in cells]
    clip, seen = observe(study.generator, contestant.method, prompts, seeds, on_step=tick)
    for i, cell in enumerate(cells):
        study.store.save(contestant.id, cell, sample_of(study, clip, i, seen))


def sample_of(study: Study, clip: Clip, index: int, seen: dict[str, Any]) -> Sample:
    """One sample of a batch, as the store keeps it."""
    latents = clip.latents[index] if study.keeps_latents and clip.latents is not None else None
    facts = {**seen, "batch": len(clip.frames), "sitting": study.sitting}
    return Sample(to_uint8(clip.frames[index]), latents, facts)
