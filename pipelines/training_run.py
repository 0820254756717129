"""What the training scripts share: the options, the log, the clock and the loop of a run.

Notable choices
- Needs torch only.
- --steps or --seconds ends a run; progress in [0, 1] follows the one that was given, over all parts of a resumed run.
- A row of the log is printed, kept for the card, and appended to log.jsonl at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveal.pipelines.host_info import synchronize

SYNC_EVERY = 10  # steps the CPU may run ahead of the GPU; keeps the wall clock honest


class TrainingRun:
    """One run: its log, its clock and its loop. A script adds evaluate, save and report, and what comes before and after.

    args: parsed by `parse`. trainer: has train_step(progress), step, device, model. spec: has an id.
    """

    report_every = 250  # steps

    def __init__(self, args: argparse.Namespace, trainer: Any, spec: Any) -> None:
        self.args, self.trainer, self.spec = args, trainer, spec
        self.out, self.checkpoint = Path(args.out), Path(args.checkpoint or f"runs/train-{args.model}")
        self.rows: list[dict[str, Any]] = []
        self.commands: list[str] = []
        self.started = args.started
        self.spent = 0.0  # seconds of earlier, interrupted parts
        self.lost = 0.0  # of all parts, before their first step
        self.last = time.perf_counter(), 0

    # ---- what a script adds
    def evaluate(self) -> None:
        """A look on the way, into the log."""
        raise NotImplementedError

    def save(self) -> None:
        """The checkpoint, and whatever else is kept."""
        raise NotImplementedError

    def report(self, event: str) -> None:
        """A row about the training itself."""
        raise NotImplementedError

    # ---- clock and log
    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.started

    def progress(self) -> float:
        if self.args.steps:
            return self.trainer.step / self.args.steps
        return (self.seconds - self.lost) / max(1e-6, self.args.seconds - self.args.reserve - self.lost)

    def goes_on(self) -> bool:
        """Whether this call may take another step."""
        return True

    def log(self, event: str, **facts: Any) -> None:
        row = {"event": event, "seconds": round(self.seconds, 1), **facts}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def start(self, command: str, **facts: Any) -> None:
        """The first row, and the command for the card."""
        self.commands.append(command)
        trainer = self.trainer
        name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "CPU"
        known = {"device": name, "torch": torch.__version__, "network": type(trainer.model).__name__, **facts}
        self.log("start", model=self.spec.id, **known, step=trainer.step, recipe=dataclasses.asdict(trainer.recipe))

    # ---- loop
    def train(self) -> None:
        """Until the steps or the seconds are used up; evaluates and saves on the way."""
        trainer = self.trainer
        next_eval = _next_eval(self.progress(), self.args.evals)
        self.last = time.perf_counter(), trainer.step
        while (progress := self.progress()) < 1 and self.goes_on():
            trainer.train_step(progress)
            if trainer.step % SYNC_EVERY == 0:
                synchronize(trainer.device)
            if self.should_report():
                self.report("train")
            if next_eval <= self.progress() < 1:
                self.evaluate()
                self.save()
                next_eval = _next_eval(self.progress(), self.args.evals)
                self.last = time.perf_counter(), trainer.step
        self.save()
        self.report("done")

    def should_report(self) -> bool:
        step = self.trainer.step
        return step in (1, SYNC_EVERY) or step % self.report_every == 0

    def pace(self) -> float:
        """Milliseconds a step since this was last asked; evaluations do not count."""
        now, (then, step) = time.perf_counter(), self.last
        self.last = now, self.trainer.step
        return round(1000 * (now - then) / max(1, self.trainer.step - step), 1)


# ---- options
def options(
    name: str, description: str, models: Iterable[str], *, reserve: float, model: str | None = None
) -> argparse.ArgumentParser:
    """A parser with the options of every script. reserve: default of --reserve; model: of --model, None: it must be given."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    add = parser.add_argument
    add("--model", choices=sorted(models), required=model is None, default=model)
    add("--out", required=True, help="folder for the export, the log and whatever pictures there are")
    add("--checkpoint", help="folder for checkpoints (default runs/train-MODEL)")
    add("--steps", type=int, default=0, help="train this many steps in all")
    add("--seconds", type=float, default=0.0, help="train for this wall time in all, evaluation included")
    add("--reserve", type=float, default=reserve, help="seconds of --seconds kept for the final evaluation")
    add("--resume", action="store_true", help="continue from --checkpoint")
    add("--device", help="default: cuda if there is one")
    add("--no-compile", action="store_true", help="ordinary blocks instead of compiled ones")
    add("--evals", type=int, default=4, help="evaluations, and checkpoints, on the way")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options, with `started` and a `device` that is a torch.device. Exits with 2 where they cannot be."""
    args = parser.parse_args(argv)
    args.started = time.perf_counter()
    if bool(args.steps) == bool(args.seconds):
        parser.error("give either --steps or --seconds: one of them ends the run and shapes the learning rate.")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def recipe_options(parser: argparse.ArgumentParser, whole: Sequence[str], real: Sequence[str]) -> None:
    """Options that override fields of the recipe: whole numbers and real ones."""
    for kind, names in ((int, whole), (float, real)):
        for name in names:
            parser.add_argument(f"--{name}", type=kind, help="overrides the model's recipe")


def given(args: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    """The recipe's fields that were given as options."""
    found = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(recipe)}
    return {name: value for name, value in found.items() if value is not None}


def command(name: str, argv: Sequence[str], folders: Sequence[str]) -> str:
    """The command as the card shows it: what the options `folders` name, by its last part only."""
    shown = [Path(word).name if before in folders else word for before, word in zip(["", *argv], argv, strict=False)]
    return f"python -m foveal.pipelines.{name} {' '.join(shown)}"


# ---- device
def compile_blocks(blocks: Iterable[nn.Module], *, dynamic: bool = False) -> None:
    """One graph for identical blocks, for each shape unless `dynamic`; what cannot be compiled runs as it is."""
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.suppress_errors = True
    for block in blocks:
        block.compile(dynamic=dynamic)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Evaluation without compiled blocks: its shapes are many and its time is short."""
    with torch.compiler.set_stance("force_eager"):
        yield


def memory_gib(device: torch.device) -> float | None:
    """The most memory used so far; None on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None


def _next_eval(progress: float, evals: int) -> float:
    """The next of `evals` evenly spaced points of a run; infinity when none is left."""
    points = [(k + 1) / (evals + 1) for k in range(evals)]
    return min((point for point in points if point > progress), default=float("inf"))
