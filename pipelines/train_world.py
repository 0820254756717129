"""Train a toy model of the world and export it, ready to load.

    python -m foveal.pipelines.train_world --model world-nano --seconds 240 --out world-nano
    python -m foveal.pipelines.train_world --model world-video --seconds 520 --init one-object --out world-video --compact
    python -m foveal.pipelines.train_world --model tiny-two --steps 30 --out tiny --checkpoint tiny-run  # a CPU will do

Writes config.json, model.safetensors, text.safetensors, README.md and log.jsonl to --out, and checkpoints elsewhere.

Notable choices
- Needs torch, numpy and safetensors only; the stock diffusers transformer is used where it is installed, its twin
  elsewhere.
- The gate is what the reader sees, never the loss: between "no motion at all" and "motion right" the loss hardly moves.
- A model with one object is judged on random scenes; one with two on the fixed prompts, by kind and by size.
- With --steps the learning rate follows the step and a resumed run repeats an uninterrupted one; with --seconds it
  follows the wall clock, and the budget covers start-up, training and evaluation, over all resumes. --part-seconds
  ends this call early, evaluated and exported, to be resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveal.pipelines.training_run import (
    SYNC_EVERY,
    TrainingRun,
    command,
    compile_blocks,
    given,
    options,
    parse,
    recipe_options,
)
from foveal.pipelines.world import checkpoint
from foveal.pipelines.world.card import card
from foveal.pipelines.world.evaluation import evaluate, evaluate_real, forward_facts
from foveal.pipelines.world.examination import GROUPS, Paper, examine, examine_real, missed
from foveal.pipelines.world.export import export, record
from foveal.pipelines.world.models import MODELS, ModelSpec, build_transformer
from foveal.pipelines.world.text import TextTable
from foveal.pipelines.world.training import RECIPES, Recipe, Trainer, start_from_nothing

# steps, guidance, held-out triples; the first row is the gate
FINAL = ((8, 1.0, False), (8, 1.0, True), (16, 1.0, False), (4, 1.0, False), (8, 2.0, False))
REPORT_EVERY, REPORT_SECONDS = 500, 15.0  # steps, seconds


class Run(TrainingRun):
    """One run of a model of the world."""

    report_every = REPORT_EVERY
    trainer: Trainer
    spec: ModelSpec

    def __init__(self, args: argparse.Namespace, trainer: Trainer, spec: ModelSpec) -> None:
        super().__init__(args, trainer, spec)
        self.reported = self.started
        shape = trainer.recipe.at(1.0, 0)[0]
        self.batches = {shape.size: shape.batch}
        self.batches |= {shape.size: shape.batch for stage in trainer.recipe.stages for shape in stage.shapes}

    def left(self) -> float:
        """Seconds of this call's budget that are left; infinity if there is none."""
        part = (self.args.part_seconds or float("inf")) - (time.perf_counter() - self.started)
        return min(part, self.args.seconds - self.seconds if self.args.seconds else float("inf"))

    def save(self) -> None:
        facts = {"rows": self.rows, "commands": self.commands, "seconds": self.seconds}
        checkpoint.save(self.trainer, self.checkpoint, compact=self.args.compact, **facts)

    def resume(self) -> None:
        record = checkpoint.resume(self.trainer, self.checkpoint)
        self.rows, self.commands, self.spent = record["rows"], record["commands"], record["seconds"]

    def facts(self) -> dict[str, Any]:
        trainer = self.trainer
        loss = None if trainer.loss is None else round(trainer.loss.item(), 5)
        by_size = {f"loss_{size}": round(value.item(), 5) for size, value in sorted(trainer.losses.items())}
        return {"step": trainer.step, "clips": trainer.clips, "loss": loss, **(by_size if len(by_size) > 1 else {})}

    def judge(self, n: int, **setting: Any) -> dict[str, Any]:
        trainer = self.trainer
        with trainer.averaged():
            batch = min(n, 128)
            return evaluate(trainer.model, trainer.text, self.spec, n=n, batch=batch, bf16=trainer.bf16, **setting)

    def examine(self, paper: Paper, size: int) -> list[dict[str, Any]]:
        trainer = self.trainer
        with trainer.averaged():
            return examine(trainer.model, trainer.text, self.spec, paper, size, self.batches[size], trainer.bf16)

    def goes_on(self) -> bool:
        return self.left() > self.args.reserve * (self.args.part_seconds > 0)

    def report(self, event: str) -> None:
        self.log(event, **self.facts())

    def should_report(self) -> bool:
        now, late = time.perf_counter(), bool(self.args.seconds and self.trainer.step % SYNC_EVERY == 0)
        due = super().should_report() or (late and now - self.reported > REPORT_SECONDS)
        self.reported = now if due else self.reported
        return due

    def evaluate(self) -> None:
        """A look on the way: the fixed prompts, one seed, at every size; or random scenes for a one-object model."""
        facts, args = self.facts(), self.args
        if self.spec.world == 1:
            seen = self.judge(args.eval_n, steps=self.spec.steps, guidance=self.spec.guidance)
            self.log("eval", **facts, **seen)
            return
        paper = Paper(tuple(GROUPS)[:3], min(args.eval_n, 64), steps=self.spec.steps)
        for row in (row for size in self.spec.sizes for row in self.examine(paper, size)):
            self.log("eval", **facts, **row)

    def finish(self) -> bool:
        """Final metrics, the export and its card.  -> whether the gates were passed"""
        spec = self.spec
        config = export(self.out, spec, self.trainer.ema)
        record(self.out, forward=forward_facts(spec, self.trainer.ema))
        lacking = self.final() if spec.world == 1 else self.final_examination()
        self.log("gate", passed=not lacking, missed=lacking)
        done = max(i for i, row in enumerate(self.rows) if row["event"] == "done")
        rows = [row for row in self.rows[done:] if row["event"] in ("real", "final")]
        record(self.out, measured=[{k: v for k, v in row.items() if k != "seconds"} for row in rows])
        text = card(spec, self.trainer.recipe, self.rows, config["params"], self.commands)
        (self.out / "README.md").write_text(text, encoding="utf-8")
        return not lacking

    def final(self) -> list[str]:
        """Random scenes of a one-object model.  -> gates that were missed"""
        args = self.args
        self.log("real", **evaluate_real(self.spec, args.final_n, self.trainer.device))
        first = None
        for steps, guidance, held_out in FINAL:
            if first is not None and self.left() < 5:
                break
            facts = self.judge(args.final_n, steps=steps, guidance=guidance, held_out=held_out)
            self.log("final", **facts)
            first = facts if first is None else first
        gate = 0.97 if args.gate is None else args.gate
        right = first["acc_all"] if first else 0.0
        return [] if right >= gate else [f"acc_all {right}, needed {gate}"]

    def final_examination(self) -> list[str]:
        """All groups of fixed prompts with four seeds, the largest size first; then fewer and more steps, while time lasts."""
        args, spec = self.args, self.spec
        prompts, seeds = min(64, max(2, args.final_n // 4)), 4 if args.final_n >= 256 else 1
        paper, rows = Paper(tuple(GROUPS), prompts, seeds, spec.steps), []
        for size in sorted(spec.sizes, key=lambda size: size != spec.size):
            for row in self.examine(paper, size):
                self.log("final", **row)
                rows.append(row)
            for row in examine_real(spec, paper, size, self.trainer.device):
                self.log("real", **row)
        for steps in (4, 16):
            if self.left() > 12:
                for row in self.examine(Paper(tuple(GROUPS)[:2], prompts, 1, steps), spec.size):
                    self.log("final", **row)
        if args.gate is not None:
            spec = dataclasses.replace(spec, gates=(("one", "acc_all", args.gate),))
        return missed(spec, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """0: exported and the gate passed. 1: exported, gate missed. 2: wrong options."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parse(parser, argv)
    try:
        spec, recipe = _settings(args)
        run = Run(args, _trainer(args, spec, recipe), spec)
        if args.resume:
            run.resume()
    except ValueError as error:
        parser.error(str(error))
    run.start(command("train_world", argv, ("--out", "--checkpoint", "--init")))
    run.train()
    passed = run.finish()
    if not passed:
        print(f"below the gate ({'; '.join(run.rows[-1]['missed'])}): exported, but not fit to ship.", file=sys.stderr)
    return 0 if passed else 1


def _settings(args: argparse.Namespace) -> tuple[ModelSpec, Recipe]:
    """The presets of a model, with the options that were given."""
    chosen = given(args, Recipe)
    recipe = dataclasses.replace(RECIPES[args.model], **chosen)
    if recipe.stages and {"size", "batch", "shift"} & chosen.keys():
        raise ValueError(f"{args.model} is trained on a mixture of sizes: --size, --batch and --shift do not apply.")
    spec = dataclasses.replace(MODELS[args.model], frames=recipe.frames, size=recipe.size, shift=recipe.shift)
    return spec, recipe


def _trainer(args: argparse.Namespace, spec: ModelSpec, recipe: Recipe) -> Trainer:
    device = args.device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.seed)
    model, text = build_transformer(spec.transformer, args.network), TextTable(spec.transformer["text_dim"])
    start_from_nothing(model)
    trainer = Trainer(model, text, recipe, device)
    if args.init:
        checkpoint.start_from(trainer, Path(args.init))
    if device.type == "cuda" and not args.no_compile:
        compile_blocks(model.blocks)
    return trainer


def _parser() -> argparse.ArgumentParser:
    parser = options("train_world", "Train a toy model of the world and export it.", RECIPES, reserve=25.0)
    add = parser.add_argument
    add("--init", help="checkpoint or exported folder of another run to take the weights from")
    add("--network", choices=("auto", "stock", "twin"), default="auto")
    add("--eval-n", type=int, default=128, help="clips of each")
    add("--final-n", type=int, default=256, help="clips of each final evaluation")
    add("--gate", type=float, help="acc_all (of one object) that the export must reach, instead of the model's gates")
    add("--part-seconds", type=float, default=0.0, help="end this call after this wall time, evaluated and exported")
    add("--compact", action="store_true", help="checkpoints in files below 16 MB, moments in bf16")
    recipe_options(parser, ("frames", "size", "batch", "warmup", "seed"), ("lr", "shift", "decay", "high", "ema"))
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
