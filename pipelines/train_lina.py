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
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from foveal.pipelines.lina import checkpoint
from foveal.pipelines.lina.card import card
from foveal.pipelines.lina.data import Data, load_data
from foveal.pipelines.lina.evaluation import Measure, copies, sheet
from foveal.pipelines.lina.export import export
from foveal.pipelines.lina.judge import train_judge
from foveal.pipelines.lina.models import MODELS, RECIPES, LinaSpec, Recipe
from foveal.pipelines.lina.training import Trainer
from foveal.vision.lina import LinaModel
from foveal.vision.lina_generate import Sampling

# (steps or None for the model's own, flow steps or None, guidance); the first rows decide the model's own guidance
FINAL: tuple[tuple[int | None, int | None, float], ...] = (
    (None, None, 1.5), (None, None, 1.0), (None, None, 2.0), (None, None, 3.0), (8, None, 1.5), (32, None, 1.5), (64, None, 1.5),
    (None, 10, 1.5), (None, 50, 1.5), (4, None, 1.5),
)  # fmt: skip
SYNC_EVERY = 10  # steps the CPU may run ahead of the GPU; keeps the wall clock honest
REPORT_EVERY = 250


class Run:
    """One run: its log, its clock and its loop."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer, spec: LinaSpec, data: Data) -> None:
        self.args, self.trainer, self.spec, self.data = args, trainer, spec, data
        self.out, self.checkpoint = Path(args.out), Path(args.checkpoint or f"runs/train-{args.model}")
        self.rows: list[dict[str, Any]] = []
        self.commands: list[str] = []
        self.spent = 0.0  # seconds of earlier, interrupted parts
        self.lost = 0.0  # of all parts, before their first step
        self.last = time.perf_counter(), 0

    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.args.started

    def log(self, event: str, **facts: Any) -> None:
        row = {"event": event, "seconds": round(self.seconds, 1), **facts}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def progress(self) -> float:
        if self.args.steps:
            return self.trainer.step / self.args.steps
        return (self.seconds - self.lost) / max(1e-6, self.args.seconds - self.args.reserve - self.lost)

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
            _synchronise(self.trainer.device)
            self.log("warm", memory_gib=_memory(self.trainer.device))
        self.lost += self.seconds - self.spent

    def train(self) -> None:
        """Until the steps or the seconds are used up; evaluates and saves on the way."""
        trainer = self.trainer
        next_eval = _next_eval(self.progress(), self.args.evals)
        self.last = time.perf_counter(), trainer.step
        while self.progress() < 1:
            trainer.train_step(self.progress())
            if trainer.step % SYNC_EVERY == 0:
                _synchronise(trainer.device)
            if trainer.step in (1, SYNC_EVERY) or trainer.step % REPORT_EVERY == 0:
                self.report("train")
            if next_eval <= self.progress() < 1:
                facts = self.sampled(None, None, self.spec.guidance, self.args.eval_n, 1)
                self.log("eval", step=trainer.step, loss=self.loss(), **facts)
                self.save()
                next_eval = _next_eval(self.progress(), self.args.evals)
                self.last = time.perf_counter(), trainer.step
        self.save()
        self.report("done")

    def sampled(self, steps: int | None, flow: int | None, guidance: float, n: int, batches: int) -> dict[str, Any]:
        """Facts about samples of the averaged weights, in fp32."""
        own = Sampling(steps or self.spec.steps, flow or self.spec.flow_steps, guidance, self.spec.min_guidance)
        with self.trainer.averaged(), _eagerly():
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
        with self.trainer.averaged(), _eagerly():
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
        trainer, now = self.trainer, time.perf_counter()
        pace = 1000 * (now - self.last[0]) / max(1, trainer.step - self.last[1])
        self.last = now, trainer.step
        facts = {"step": trainer.step, "ms_per_step": round(pace, 1), "loss": self.loss()}
        self.log(event, progress=round(self.progress(), 3), memory_gib=_memory(trainer.device), **facts)

    def loss(self) -> float | None:
        return None if self.trainer.loss is None else round(self.trainer.loss.item(), 5)


def main(argv: Sequence[str] | None = None) -> int:
    """0: exported and the gate passed. 1: exported, gate missed. 2: wrong options."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(argv)
    args.started = time.perf_counter()
    if bool(args.steps) == bool(args.seconds):
        parser.error("give either --steps or --seconds: one of them ends the run and shapes the learning rate.")
    recipe = dataclasses.replace(RECIPES[args.model], **_given(args))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    spec = MODELS[args.model]
    try:
        data = load_data(spec.data, Path(args.data) if args.data else None, spec.config.side).to(device)
        run = Run(args, _trainer(args, spec, data, recipe, device), spec, data)
        if args.resume:
            run.resume()
    except ValueError as error:
        parser.error(str(error))
    run.commands.append(_command(argv))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts = {"device": name, "torch": torch.__version__, "commit": args.commit, "step": run.trainer.step}
    run.log("start", model=args.model, **facts, recipe=dataclasses.asdict(recipe))
    run.prepare()
    run.train()
    passed = run.finish()
    if not passed:
        print(f"accuracy is below the gate of {args.gate}: exported, but not fit to ship.", file=sys.stderr)
    return 0 if passed else 1


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields that were given as options."""
    options = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Recipe)}
    return {name: value for name, value in options.items() if value is not None}


def _command(argv: Sequence[str]) -> str:
    """The command as the card shows it: folders by their last name only."""
    folders = ("--out", "--checkpoint", "--data")
    shown = [Path(word).name if before in folders else word for before, word in zip(["", *argv], argv, strict=False)]
    return f"python -m foveal.pipelines.train_lina {' '.join(shown)}"


def _trainer(args: argparse.Namespace, spec: LinaSpec, data: Data, recipe: Recipe, device: torch.device) -> Trainer:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.seed)
    trainer = Trainer(LinaModel(spec.config), data.train, recipe, device)
    if device.type == "cuda" and not args.no_compile:
        _compile_blocks(trainer.model)
    return trainer


def _compile_blocks(model: LinaModel) -> None:
    """One graph for each kind of block, reused by those of a kind; what cannot be compiled runs as it is."""
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.suppress_errors = True
    for block in (*model.connector.blocks, *model.encoder, *model.decoder, *model.head.blocks):
        block.compile(dynamic=False)


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Evaluation without compiled blocks: its shapes are many and its time is short."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _next_eval(progress: float, evals: int) -> float:
    """The next of `evals` evenly spaced points of a run; infinity when none is left."""
    points = [(k + 1) / (evals + 1) for k in range(evals)]
    return min((point for point in points if point > progress), default=float("inf"))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_lina", description="Train the small LINA, judge it, export it.")
    add = parser.add_argument
    add("--model", choices=sorted(RECIPES), default="lina-fashion")
    add("--data", help="folder below which Fashion-MNIST's four .gz files lie")
    add("--out", required=True, help="folder for the export, the log and the pictures")
    add("--checkpoint", help="folder for checkpoints (default runs/train-MODEL)")
    add("--steps", type=int, default=0, help="train this many steps in all")
    add("--seconds", type=float, default=0.0, help="train for this wall time in all, evaluation included")
    add("--reserve", type=float, default=70.0, help="seconds of --seconds kept for the final evaluation")
    add("--resume", action="store_true", help="continue from --checkpoint")
    add("--device", help="default: cuda if there is one")
    add("--no-compile", action="store_true")
    add("--evals", type=int, default=3, help="evaluations, exports and checkpoints on the way")
    add("--eval-n", type=int, default=1000, help="samples of each")
    add("--final-n", type=int, default=2000, help="samples of each batch of the final evaluation")
    add("--final-batches", type=int, default=5, help="batches of the final evaluation, at most 10")
    add("--finals", type=int, default=len(FINAL), help="settings of the final evaluation, the first ones of FINAL")
    add("--copies-n", type=int, default=500, help="samples whose nearest training picture is looked for, or 0")
    add("--shown", type=int, default=10, help="samples of every class in samples.png, or 0")
    add("--gate", type=float, default=0.85, help="share of samples that must be recognised at the model's own settings")
    add("--commit", help="commit of the code, for the card")
    for name in ("batch", "warmup", "seed", "draws", "judge-steps"):
        add(f"--{name}", type=int, help="overrides the model's recipe")
    for name in ("lr", "decay", "ema", "mask-low", "mask-std"):
        add(f"--{name}", type=float, help="overrides the model's recipe")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
