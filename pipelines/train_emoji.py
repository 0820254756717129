"""Train the toy text-to-image model of emoji scenes and export it.

    python -m foveal.pipelines.train_emoji --seconds 570 --out emoji-flux
    python -m foveal.pipelines.train_emoji --model tiny --steps 30 --out tiny    # a CPU will do

Writes config.json, model.safetensors, text.safetensors, README.md, log.jsonl and samples.png to --out, and checkpoints,
three files below 16 MB, to --checkpoint.

Notable choices
- Needs torch, numpy and safetensors only; the stock diffusers transformer is used where it is installed, its twin
  elsewhere.
- The gate is what the reader sees (acc_all), never the loss.
- --seconds covers start-up, training, evaluation and export; the learning rate and the frame sizes follow the wall
  clock then, and the step with --steps. A resumed run needs the larger total.
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

from foveal.pipelines.emoji import checkpoint
from foveal.pipelines.emoji.card import card
from foveal.pipelines.emoji.evaluation import draw, evaluate, evaluate_real, validation_attributes
from foveal.pipelines.emoji.export import export
from foveal.pipelines.emoji.models import MODELS, EmojiSpec, build_transformer
from foveal.pipelines.emoji.png import write_png
from foveal.pipelines.emoji.text import TextTable
from foveal.pipelines.emoji.training import RECIPES, EmojiTrainer, start_from_nothing
from foveal.pipelines.world.export import record
from foveal.pipelines.world.training import Recipe

FINAL = (  # size, steps, guidance, held-out combinations; the first row is the gate
    (128, 8, 1.0, False),
    (256, 8, 1.0, False),
    (128, 8, 1.0, True),
    (256, 8, 1.0, True),
    (128, 16, 1.0, False),
    (256, 16, 1.0, False),
    (128, 8, 1.5, False),
    (256, 8, 1.5, False),
    (64, 8, 1.0, False),
    (128, 4, 1.0, False),
)
SYNC_EVERY = 10  # steps the CPU may run ahead of the GPU; keeps the wall clock honest
REPORT_EVERY = 250


class Run:
    """One run: its log, its clock and its loop."""

    def __init__(self, args: argparse.Namespace, trainer: EmojiTrainer, spec: EmojiSpec) -> None:
        self.args, self.trainer, self.spec = args, trainer, spec
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
        facts = {"rows": self.rows, "commands": self.commands, "seconds": self.seconds, "lost": self.lost}
        export(self.out, self.spec, self.trainer.ema)
        checkpoint.save(self.trainer, self.checkpoint, **facts)

    def resume(self) -> None:
        exported = Path(self.args.average or self.args.out)
        kept = checkpoint.resume(self.trainer, self.checkpoint, exported)
        self.rows, self.commands, self.spent, self.lost = (kept[k] for k in ("rows", "commands", "seconds", "lost"))

    def judge(self, size: int, n: int, seeds: int, **settings: Any) -> dict[str, Any]:
        trainer = self.trainer
        with trainer.averaged(), _eagerly():
            common: dict[str, Any] = {"size": size, "n": n, "seeds": seeds, "bf16": trainer.bf16}
            return evaluate(trainer.model, trainer.text, self.spec, **common, **settings)

    def train(self) -> None:
        """Until the steps or the seconds are used up; evaluates and saves on the way."""
        trainer = self.trainer
        if trainer.device.type == "cuda":
            self.warm_up()
        next_eval = _next_eval(self.progress(), self.args.evals)
        self.last = time.perf_counter(), trainer.step
        while (progress := self.progress()) < 1:
            trainer.train_step(progress)
            if trainer.step % SYNC_EVERY == 0:
                _synchronise(trainer.device)
            if trainer.step in (1, SYNC_EVERY) or trainer.step % REPORT_EVERY == 0:
                self.report("train")
            if self.progress() >= next_eval and self.progress() < 1:
                for size in self.args.eval_sizes:
                    facts = self.judge(size, self.args.eval_n, 1)
                    self.log("eval", step=trainer.step, loss=self.losses().get(str(size)), **facts)
                self.save()
                next_eval = _next_eval(self.progress(), self.args.evals)
                self.last = time.perf_counter(), trainer.step
        self.save()
        self.report("done")

    def warm_up(self) -> None:
        """Every shape once; the schedule starts after it."""
        for shape in self.trainer.shapes():
            self.trainer.warm_up(shape)
            _synchronise(self.trainer.device)
            self.log("warm", size=shape.size)
        self.lost += self.seconds - self.spent

    def report(self, event: str) -> None:
        trainer, now = self.trainer, time.perf_counter()
        pace = 1000 * (now - self.last[0]) / max(1, trainer.step - self.last[1])
        self.last = now, trainer.step
        memory = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else None
        seen = {str(size): n for size, n in trainer.seen.items()}
        facts = {"step": trainer.step, "ms_per_step": round(pace, 1), "seen": seen, "losses": self.losses()}
        self.log(event, progress=round(self.progress(), 3), memory_gib=memory and round(memory, 1), **facts)

    def losses(self) -> dict[str, float]:
        return {str(size): round(loss.item(), 5) for size, loss in self.trainer.losses.items()}

    def finish(self) -> bool:
        """Final metrics, pictures and the card.  -> whether the gate was passed"""
        args, first = self.args, None
        rates: dict[str, float] = {}
        if args.shown:
            self.picture(args.shown)
        for size in (128, 256):
            self.log("real", **evaluate_real(size, args.final_n, args.final_seeds, self.trainer.device))
        for size, steps, guidance, held_out in FINAL[: args.finals]:
            if first is not None and args.seconds and self.seconds > args.seconds - 10:
                break
            settings = {"steps": steps, "guidance": guidance, "held_out": held_out}
            facts = self.judge(size, args.final_n, args.final_seeds, **settings)
            self.log("final", **facts)
            if (steps, guidance, held_out) == (self.spec.steps, self.spec.guidance, False):
                rates[str(size)] = facts["acc_all"]
            record(self.out, rates=rates)
            self.card()  # whatever happens next
            first = first or facts
        passed = first is not None and first["acc_all"] >= args.gate
        self.log("gate", acc_all=first["acc_all"] if first else None, needed=args.gate, passed=passed)
        return passed

    def card(self) -> None:
        params = sum(p.numel() for p in self.trainer.model.parameters())
        text = card(self.spec, self.trainer.recipe, self.rows, params, self.commands)
        (self.out / "README.md").write_text(text, encoding="utf-8")

    def picture(self, shown: int) -> None:
        """samples.png: the first validation prompts, twelve a row at 128 pixels and six a row at 256."""
        trainer, attributes = self.trainer, validation_attributes(shown)
        bands = []
        with trainer.averaged(), _eagerly():
            for size, count in ((128, shown), (256, shown // 2)):
                images = draw(trainer.model, trainer.text, self.spec, attributes[:count], size, bf16=trainer.bf16)
                across = 1536 // size
                grid = (images * 255).round().byte().view(count // across, across, 3, size, size)
                bands.append(grid.permute(0, 3, 1, 4, 2).reshape(-1, 1536, 3).cpu())
        write_png(self.out / "samples.png", torch.cat(bands).numpy())


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
    run = Run(args, _trainer(args, recipe, device), MODELS[args.model])
    if args.resume:
        try:
            run.resume()
        except ValueError as error:
            parser.error(str(error))
    run.commands.append(_command(argv))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts = {"device": name, "torch": torch.__version__, "network": type(run.trainer.model).__name__}
    run.log("start", model=args.model, **facts, commit=args.commit, step=run.trainer.step, recipe=_plain(recipe))
    run.train()
    passed = run.finish()
    if not passed:
        print(f"acc_all is below the gate of {args.gate}: exported, but not fit to ship.", file=sys.stderr)
    return 0 if passed else 1


def _plain(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields that were given as options."""
    options = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Recipe)}
    return {name: value for name, value in options.items() if value is not None}


def _command(argv: Sequence[str]) -> str:
    """The command as the card shows it: folders by their last name only."""
    folders = ("--out", "--checkpoint", "--average")
    shown = [Path(word).name if before in folders else word for before, word in zip(["", *argv], argv, strict=False)]
    return f"python -m foveal.pipelines.train_emoji {' '.join(shown)}"


def _trainer(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> EmojiTrainer:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # cuDNN's backward of attention fails on these lengths (image plus a few text tokens, no multiple of 8).
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(recipe.seed)
    transformer = MODELS[args.model].transformer
    model, text = build_transformer(transformer, args.network), TextTable(transformer["joint_attention_dim"])
    start_from_nothing(model)
    trainer = EmojiTrainer(model, text, recipe, device)
    if device.type == "cuda" and not args.no_compile:
        _compile_blocks(model)
    return trainer


def _compile_blocks(model: Any) -> None:
    """One graph for all frame sizes, reused by the identical blocks; what cannot be compiled runs as it is."""
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.suppress_errors = True
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(dynamic=True)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_emoji", description="Train the toy model of emoji scenes, export it.")
    add = parser.add_argument
    add("--model", choices=sorted(RECIPES), default="emoji-flux")
    add("--out", required=True, help="folder for the export, the log and the pictures")
    add("--checkpoint", help="folder for checkpoints (default runs/train-MODEL)")
    add("--steps", type=int, default=0, help="train this many steps in all")
    add("--seconds", type=float, default=0.0, help="train for this wall time in all, evaluation included")
    add("--reserve", type=float, default=70.0, help="seconds of --seconds kept for the final evaluation")
    add("--resume", action="store_true", help="continue from --checkpoint")
    add("--average", help="with --resume: folder of the model exported beside the checkpoint (default --out)")
    add("--device", help="default: cuda if there is one")
    add("--network", choices=("auto", "stock", "twin"), default="auto")
    add("--no-compile", action="store_true")
    add("--evals", type=int, default=4, help="evaluations, exports and checkpoints on the way")
    add("--eval-n", type=int, default=64, help="prompts of each, one seed")
    add("--eval-sizes", type=int, nargs="+", default=[64, 128, 256], help="frame sizes of each")
    add("--final-n", type=int, default=64, help="prompts of each final evaluation")
    add("--final-seeds", type=int, default=4, help="seeds of each prompt")
    add("--finals", type=int, default=len(FINAL), help="settings of the final evaluation, the first ones of FINAL")
    add("--shown", type=int, default=24, help="images in samples.png, a multiple of 12, or 0")
    add("--gate", type=float, default=0.8, help="acc_all at 128 pixels that the export must reach")
    add("--commit", help="commit of the code, for the card")
    for name in ("warmup", "seed"):
        add(f"--{name}", type=int, help="overrides the model's recipe")
    for name in ("lr", "decay", "high", "ema"):
        add(f"--{name}", type=float, help="overrides the model's recipe")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
