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
import dataclasses
import sys
from collections.abc import Sequence
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
from foveal.pipelines.host_info import synchronize
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
from foveal.pipelines.world.export import record
from foveal.pipelines.world.training import Recipe

FINAL = (  # size, steps, guidance, held-out combinations; the first row is the gate
    (128, 8, 2.0, False),
    (256, 8, 2.0, False),
    (128, 8, 2.0, True),
    (256, 8, 2.0, True),
    (128, 16, 2.0, False),
    (256, 16, 2.0, False),
    (128, 8, 1.0, False),
    (256, 8, 1.0, False),
    (64, 8, 2.0, False),
    (128, 4, 2.0, False),
)


class Run(TrainingRun):
    """One run of the emoji model."""

    trainer: EmojiTrainer
    spec: EmojiSpec

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
        with trainer.averaged(), eagerly():
            common: dict[str, Any] = {"size": size, "n": n, "seeds": seeds, "bf16": trainer.bf16}
            return evaluate(trainer.model, trainer.text, self.spec, **common, **settings)

    def train(self) -> None:
        if self.trainer.device.type == "cuda":
            self.warm_up()
        super().train()

    def evaluate(self) -> None:
        for size in self.args.eval_sizes:
            facts = self.judge(size, self.args.eval_n, 1)
            self.log("eval", step=self.trainer.step, loss=self.losses().get(str(size)), **facts)

    def warm_up(self) -> None:
        """Every shape once; the schedule starts after it."""
        for shape in self.trainer.shapes():
            self.trainer.warm_up(shape)
            synchronize(self.trainer.device)
            self.log("warm", size=shape.size)
        self.lost += self.seconds - self.spent

    def report(self, event: str) -> None:
        trainer = self.trainer
        seen = {str(size): n for size, n in trainer.seen.items()}
        facts = {"step": trainer.step, "ms_per_step": self.pace(), "seen": seen, "losses": self.losses()}
        self.log(event, progress=round(self.progress(), 3), memory_gib=memory_gib(trainer.device), **facts)

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
        with trainer.averaged(), eagerly():
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
    args = parse(parser, argv)
    recipe = dataclasses.replace(RECIPES[args.model], **given(args, Recipe))
    run = Run(args, _trainer(args, recipe), MODELS[args.model])
    if args.resume:
        try:
            run.resume()
        except ValueError as error:
            parser.error(str(error))
    run.start(command("train_emoji", argv, ("--out", "--checkpoint", "--average")), commit=args.commit)
    run.train()
    passed = run.finish()
    if not passed:
        print(f"acc_all is below the gate of {args.gate}: exported, but not fit to ship.", file=sys.stderr)
    return 0 if passed else 1


def _trainer(args: argparse.Namespace, recipe: Recipe) -> EmojiTrainer:
    device = args.device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # cuDNN's backward of attention fails on these lengths (image plus a few text tokens, no multiple of 8).
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(recipe.seed)
    transformer = MODELS[args.model].transformer
    model, text = build_transformer(transformer, args.network), TextTable(transformer["joint_attention_dim"])
    start_from_nothing(model)
    trainer = EmojiTrainer(model, text, recipe, device, recorded=device.type == "cuda" and not args.no_graph)
    if device.type == "cuda" and not args.no_compile:
        compile_blocks((*model.transformer_blocks, *model.single_transformer_blocks))
    return trainer


def _parser() -> argparse.ArgumentParser:
    parser = options(
        "train_emoji", "Train the toy model of emoji scenes, export it.", RECIPES, reserve=70.0, model="emoji-flux"
    )
    add = parser.add_argument
    add("--average", help="with --resume: folder of the model exported beside the checkpoint (default --out)")
    add("--network", choices=("auto", "stock", "twin"), default="auto")
    add("--no-graph", action="store_true", help="ordinary steps instead of recorded ones")
    add("--eval-n", type=int, default=64, help="prompts of each, one seed")
    add("--eval-sizes", type=int, nargs="+", default=[64, 128, 256], help="frame sizes of each")
    add("--final-n", type=int, default=64, help="prompts of each final evaluation")
    add("--final-seeds", type=int, default=4, help="seeds of each prompt")
    add("--finals", type=int, default=len(FINAL), help="settings of the final evaluation, the first ones of FINAL")
    add("--shown", type=int, default=24, help="images in samples.png, a multiple of 12, or 0")
    add("--gate", type=float, default=0.8, help="acc_all at 128 pixels that the export must reach")
    add("--commit", help="commit of the code, for the card")
    recipe_options(parser, ("warmup", "seed"), ("lr", "decay", "high", "ema"))
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
