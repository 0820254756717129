"""Train the small class-conditional LINA, judge it, and export it.

    python -m foveal.pipelines.train_lina --data FOLDER --seconds 280 --out lina-fashion
    python -m foveal.pipelines.train_lina --model nano-fashion --data FOLDER --steps 1000 --out nano    # a CPU will do
    python -m foveal.pipelines.train_lina --model tiny --steps 30 --out tiny                            # shapes, no data

Writes config.json, model.safetensors, judge.safetensors, README.md, log.jsonl and samples.png to --out, and checkpoints, four files
below 16 MB, to --checkpoint.

Notable choices
- Needs torch, numpy and safetensors only. The pictures lie on the device; a step reads nothing from the host.
- The judge is trained first, in the same run; the gate is what it says of samples, never the loss.
- --seconds covers everything; the learning rate follows the wall clock then, and the step with --steps. A resumed run needs
  the larger total, and trains the same judge again.
- The model is exported at every evaluation, so that a run that is cut off leaves a usable one.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveal.pipelines.host_info import synchronize
from foveal.pipelines.lina import checkpoint
from foveal.pipelines.lina.card import card
from foveal.pipelines.lina.data import Data, load_data
from foveal.pipelines.lina.evaluation import Measure, copies, sheet
from foveal.pipelines.lina.export import export
from foveal.pipelines.lina.judge import train_judge
from foveal.pipelines.lina.models import MODELS, RECIPES, LinaSpec, Recipe
from foveal.pipelines.lina.training import Trainer
from foveal.pipelines.training_run import (
    TrainingRun,
    command,
    compile_blocks,
    eagerly,
    given,
    memory_gib,
    options,
    parse,
    recipe_options,
)
from foveal.vision.lina import LinaModel
from foveal.vision.lina_generate import Sampling

# (steps or None for the model's own, flow steps or None, guidance); the first rows decide the model's own guidance
FINAL: tuple[tuple[int | None, int | None, float], ...] = (
    (None, None, 1.5), (None, None, 1.0), (None, None, 2.0), (None, None, 3.0), (8, None, 1.5), (32, None, 1.5), (64, None, 1.5),
    (None, 10, 1.5), (None, 50, 1.5), (4, None, 1.5),
)  # fmt: skip


class Run(TrainingRun):
    """One run of a LINA model, with its judge."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer, spec: LinaSpec, data: Data) -> None:
        super().__init__(args, trainer, spec)
        self.data = data

    def save(self) -> None:
        """The checkpoint, and the model as it is now."""
        self.export()
        facts = {"rows": self.rows, "commands": self.commands, "seconds": self.seconds, "lost": self.lost}
        checkpoint.save(self.trainer, self.checkpoint, **facts)

    def export(self) -> None:
        export(self.out, self.spec, self.data.classes, self.trainer.ema, self.measure.judge.state_dict())

    def resume(self) -> None:
        kept = checkpoint.resume(self.trainer, self.checkpoint)
        rows, self.commands, self.spent, self.lost = (kept[k] for k in ("rows", "commands", "seconds", "lost"))
        self.rows = [row for row in rows if row["event"] not in ("judge", "real")]  # these come again

    # ---- before, during, after
    def prepare(self) -> None:
        """The judge, and every shape once; the schedule starts after it."""
        recipe = self.trainer.recipe
        judge = train_judge(self.data.for_judge, len(self.data.classes), recipe.judge_steps, seed=recipe.seed)
        self.measure = Measure(judge, self.data.test)
        params = sum(p.numel() for p in judge.parameters())
        self.log("judge", accuracy=round(self.measure.accuracy, 4), params=params)
        self.log("real", **self.measure.real(self.data.unseen_by_judge, self.args.final_n, self.args.final_batches))
        if self.trainer.device.type == "cuda":
            self.trainer.loss_of(self.trainer.step).backward()
            self.trainer.optimizer.zero_grad(set_to_none=True)
            synchronize(self.trainer.device)
            self.log("warm", memory_gib=memory_gib(self.trainer.device))
        self.lost += self.seconds - self.spent

    def evaluate(self) -> None:
        facts = self.sampled(None, None, self.spec.guidance, self.args.eval_n, 1)
        self.log("eval", step=self.trainer.step, loss=self.loss(), **facts)

    def sampled(self, steps: int | None, flow: int | None, guidance: float, n: int, batches: int) -> dict[str, Any]:
        """Facts about samples of the averaged weights, in fp32."""
        own = Sampling(steps or self.spec.steps, flow or self.spec.flow_steps, guidance, self.spec.min_guidance)
        with self.trainer.averaged(), eagerly():
            return self.measure.sampled(self.trainer.model, own, n, batches)

    def finish(self) -> bool:
        """Pictures, final metrics, the model's own guidance and the card.  -> whether the gate was passed"""
        args, best = self.args, None
        own: dict[float, dict[str, Any]] = {}
        for steps, flow, guidance in FINAL[: args.finals]:
            if own and args.seconds and self.seconds > args.seconds - 10:
                break
            facts = self.sampled(steps, flow, guidance, args.final_n, args.final_batches)
            self.log("final", **facts)
            if steps is None and flow is None:
                own[guidance] = facts
                best = min(own, key=lambda g: own[g]["distance"])
                self.spec = dataclasses.replace(self.spec, guidance=best)
            self.export()
            self.card()  # whatever happens next
        with self.trainer.averaged(), eagerly():
            sampling = Sampling(self.spec.steps, self.spec.flow_steps, self.spec.guidance, self.spec.min_guidance)
            if args.copies_n:
                self.log("copies", **copies(self.trainer.model, sampling, self.data, args.copies_n))
            if args.shown:
                sheet(self.out / "samples.png", self.trainer.model, sampling, self.spec.size, args.shown)
        self.card()
        accuracy = own[best]["accuracy"] if best is not None else 0.0
        self.log("gate", accuracy=accuracy, guidance=best, needed=args.gate, passed=accuracy >= args.gate)
        return accuracy >= args.gate

    def card(self) -> None:
        params = sum(p.numel() for p in self.trainer.model.parameters())
        text = card(self.spec, self.trainer.recipe, self.data.classes, self.rows, params, self.commands)
        (self.out / "README.md").write_text(text, encoding="utf-8")

    def report(self, event: str) -> None:
        trainer = self.trainer
        facts = {"step": trainer.step, "ms_per_step": self.pace(), "loss": self.loss()}
        self.log(event, progress=round(self.progress(), 3), memory_gib=memory_gib(trainer.device), **facts)

    def loss(self) -> float | None:
        return None if self.trainer.loss is None else round(self.trainer.loss.item(), 5)


def main(argv: Sequence[str] | None = None) -> int:
    """0: exported and the gate passed. 1: exported, gate missed. 2: wrong options."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parse(parser, argv)
    recipe = dataclasses.replace(RECIPES[args.model], **given(args, Recipe))
    spec = MODELS[args.model]
    try:
        data = load_data(spec.data, Path(args.data) if args.data else None, spec.config.side).to(args.device)
        run = Run(args, _trainer(args, spec, data, recipe), spec, data)
        if args.resume:
            run.resume()
    except ValueError as error:
        parser.error(str(error))
    run.start(command("train_lina", argv, ("--out", "--checkpoint", "--data")), commit=args.commit)
    run.prepare()
    run.train()
    passed = run.finish()
    if not passed:
        print(f"accuracy is below the gate of {args.gate}: exported, but not fit to ship.", file=sys.stderr)
    return 0 if passed else 1


def _trainer(args: argparse.Namespace, spec: LinaSpec, data: Data, recipe: Recipe) -> Trainer:
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.seed)
    trainer = Trainer(LinaModel(spec.config), data.train, recipe, args.device)
    if on_gpu and not args.no_compile:
        model = trainer.model
        compile_blocks((*model.connector.blocks, *model.encoder, *model.decoder, *model.head.blocks))
    return trainer


def _parser() -> argparse.ArgumentParser:
    parser = options(
        "train_lina", "Train the small LINA, judge it, export it.", RECIPES, reserve=70.0, model="lina-fashion"
    )
    parser.set_defaults(evals=3)
    add = parser.add_argument
    add("--data", help="folder below which Fashion-MNIST's four .gz files lie")
    add("--eval-n", type=int, default=1000, help="samples of each")
    add("--final-n", type=int, default=2000, help="samples of each batch of the final evaluation")
    add("--final-batches", type=int, default=5, help="batches of the final evaluation, at most 10")
    add("--finals", type=int, default=len(FINAL), help="settings of the final evaluation, the first ones of FINAL")
    add("--copies-n", type=int, default=500, help="samples whose nearest training picture is looked for, or 0")
    add("--shown", type=int, default=10, help="samples of every class in samples.png, or 0")
    add("--gate", type=float, default=0.85, help="share of samples that must be recognised at the model's own settings")
    add("--commit", help="commit of the code, for the card")
    recipe_options(
        parser, ("batch", "warmup", "seed", "draws", "judge-steps"), ("lr", "decay", "ema", "mask-low", "mask-std")
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
