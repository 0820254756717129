"""Train a small classifier with linear attention and one with softmax attention side by side, and write what came of it.

    python -m foveal.pipelines.train_vision --data FOLDER --seconds 28
    python -m foveal.pipelines.train_vision --data FOLDER --steps 20 --tiny      # a CPU will do

--data holds MNIST's or Fashion-MNIST's four IDX files. Writes benchmarks/results/training_proof.json: per length of sequence and model
the accuracy after equal seconds and after equal steps, the time of a step, and the memory it takes.

Notable choices
- --seconds are of training per run; reading, compiling, judging and timing come on top. There is a run per model and size.
- The time of a step is not the log's: after training, steps of both models are timed in interleaved rounds.
- Intervals are 95 % bootstrap intervals over the test pictures; differences are paired by picture. They do not cover other seeds.
- Attention of the softmax model is the fastest SDPA backend for it on this machine, in training too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.pipelines.bench.image_models import FALLBACK, ON_CPU, ON_GPU, added_bytes, backend
from foveal.pipelines.bench.rounds import Rounds, Stopwatch, interleaved, watched
from foveal.pipelines.bench.rows import Rows, row, write
from foveal.pipelines.statistics import Interval, bootstrap_ci
from foveal.pipelines.vision_proof.data import Batches, Pictures, read
from foveal.pipelines.vision_proof.models import MODELS, PATCH, Shape, build, weights_of
from foveal.pipelines.vision_proof.training import Course, Recipe, Trainer, last_common, right, train

OUT = Path("benchmarks/results/training_proof.json")
BASELINE = next(iter(MODELS))
TIMED_WARM = 2


@dataclass(frozen=True, kw_only=True)
class Size:
    """One length of sequence. image: pixels a side; batch: pictures of a training step; judged: of a step of judging."""

    image: int
    batch: int
    judged: int

    @property
    def tokens(self) -> int:
        return (self.image // PATCH) ** 2


SIZES = (Size(image=112, batch=128, judged=1000), Size(image=224, batch=64, judged=250))
TINY = (Size(image=16, batch=8, judged=20),)
TINY_SHAPE = Shape(width=24, depth=1, heads=2)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a run is (seconds or steps), on what device, from which seed; rounds or timing_seconds of the timing afterwards."""

    device: torch.device
    seconds: float | None = None
    steps: int | None = None
    seed: int = 0
    timing_seconds: float = 2.0
    rounds: int | None = None


def one_size(size: Size, shape: Shape, recipe: Recipe, data: dict[str, Pictures], plan: Plan) -> Rows:
    """Both models at one size: trained one after the other, judged, then timed together."""
    recipe = replace(recipe, batch=size.batch)
    if recipe.compiled:
        torch.compiler.reset()  # sizes of an earlier run would make this one's dynamic
    order = fastest_backend(size, shape, recipe, data["train"], plan)
    with backend(order):
        courses = {name: train(trainer_of(name, size, shape, recipe, data["train"], plan), plan.seconds, plan.steps)
                   for name in MODELS}  # fmt: skip
        common = last_common(list(courses.values()))
        judged = {
            name: {step: right(course, step, data["test"], size.image, size.judged) for step in (common, course.steps)}
            for name, course in courses.items()
        }
        timed, peaks = timing(courses, plan)
    rows = []
    for name, course in courses.items():
        facts = accuracy_facts(judged, name, courses, common, plan.seed) | {
            "parameters": weights_of(course.trainer.model), "peak_bytes": peaks[name], "sdpa": order[0].name, "seed": plan.seed, "compiled": recipe.compiled,
            "steps": course.steps, "seconds": course.seconds, "loss": course.log[-1][2], "test_pictures": len(data["test"]),
            "images_per_s": 1e3 * size.batch / timed.timings[name].ms, "includes": ["data", "forward", "backward", "optimiser", "average"],
            "shape": {"tokens": size.tokens, "image": size.image, "batch": size.batch, "width": shape.width, "depth": shape.depth,
                      "heads": shape.heads, "head_dim": shape.width // shape.heads},
            "dtype": "bf16" if plan.device.type == "cuda" else "fp32",
        }  # fmt: skip
        rows.append(row(f"{size.tokens} tokens", "training_step", name, timed, BASELINE, **facts))
        print(line(rows[-1]), flush=True)
    return rows


def trainer_of(
    name: str, size: Size, shape: Shape, recipe: Recipe, pictures: Pictures, plan: Plan, seed: int | None = None
) -> Trainer:
    seed = plan.seed if seed is None else seed
    model = build(name, shape, size.image, seed, plan.device)
    return Trainer(model, Batches(pictures, size.batch, size.image, seed), recipe)


def fastest_backend(size: Size, shape: Shape, recipe: Recipe, pictures: Pictures, plan: Plan) -> tuple[Any, ...]:
    """The SDPA backend with which the softmax model trains fastest, then one for calls that it cannot take."""
    if plan.device.type != "cuda":
        return ON_CPU
    found: dict[tuple[Any, ...], float] = {}
    for order in [(first, FALLBACK) for first in ON_GPU]:
        plain = replace(recipe, compiled=False)
        trainer, watch = trainer_of(BASELINE, size, shape, plain, pictures, plan), Stopwatch(plan.device)
        with backend(order):
            for _ in range(3):
                trainer.step()
            for _ in range(5):
                with watched(watch):
                    trainer.step()
        found[order] = min(watch.times())
    return min(found, key=lambda order: found[order])


def timing(courses: dict[str, Course], plan: Plan) -> tuple[Rounds, dict[str, int | None]]:
    """Steps of all models in interleaved rounds; and the most that each holds during one. ValueError where one cannot be timed."""
    calls = {name: course.trainer.step for name, course in courses.items()}
    timed = interleaved(calls, plan.device, seconds=plan.timing_seconds, rounds=plan.rounds, warm=TIMED_WARM)
    for name, why in timed.failed.items():
        raise RuntimeError(f"steps of {name} could not be timed: {why}.")
    return timed, {name: peak_bytes(course.trainer) for name, course in courses.items()}


def peak_bytes(trainer: Trainer) -> int | None:
    """What a process with this model alone would hold during a step, pictures aside; None off the GPU."""
    added = added_bytes(trainer.step, trainer.device)
    return None if added is None else added + trainer.held_bytes()


def accuracy_facts(
    judged: dict[str, dict[int, Tensor]], name: str, courses: dict[str, Course], common: int, seed: int
) -> dict[str, Any]:
    """Accuracy at the end of the run and at the last common step; and by how much it is above the softmax model's."""
    moments = {"equal_time": {n: c.steps for n, c in courses.items()}, "equal_steps": dict.fromkeys(courses, common)}
    facts: dict[str, Any] = {}
    for moment, steps in moments.items():
        mine, theirs = judged[name][steps[name]], judged[BASELINE][steps[BASELINE]]
        got = bootstrap_ci(mine.double().numpy(), seed=seed)
        gain = None if name == BASELINE else bootstrap_ci((mine.double() - theirs.double()).numpy(), seed=seed)
        facts[moment] = {"steps": steps[name], "accuracy": _told(got), "difference": _told(gain)}
    return facts


def _told(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}


def line(r: dict[str, Any]) -> str:
    """One row as a line of text."""
    text = f"{r['case']:12} {r['impl']:5} {r['ms']:8.2f} ms a step  x{r['speedup']:.2f}  {r['parameters'] / 1e6:.2f} M"
    if r["peak_bytes"]:
        text += f"  peak {r['peak_bytes'] / 2**30:.2f} GiB"
    for moment in ("equal_time", "equal_steps"):
        got = r[moment]["accuracy"]
        text += f"  {moment.replace('_', ' ')}: {got['value']:.2%} [{got['low']:.2%}, {got['high']:.2%}] after {r[moment]['steps']} steps"
    return text


def run(
    data: Path, *, seconds: float | None = None, steps: int | None = None, out: Path = OUT, device: str | None = None, tiny: bool = False,
    seed: int = 0, images: Sequence[int] | None = None, shape: Shape | None = None, rounds: int | None = None,
    timing_seconds: float = 2.0, tested: int | None = None, compiled: bool = False,
) -> Path:  # fmt: skip
    """Train, judge, time and write. ``images``: which sizes, in pixels; ``tested``: only so many test pictures. -> its path"""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = TINY if tiny else SIZES
    wanted = [size for size in known if not images or size.image in images]
    if not wanted:
        sizes = " and ".join(str(size.image) for size in known)
        raise ValueError(f"there is no size {', '.join(map(str, images or ()))}; there are {sizes} pixels.")
    parts = {part: read(data, part).first(tested if part == "test" else None).to(place) for part in ("train", "test")}
    plan = Plan(device=place, seconds=seconds, steps=steps, seed=seed, timing_seconds=timing_seconds, rounds=rounds)
    found: Rows = []
    for size in wanted:
        found += one_size(size, shape or (TINY_SHAPE if tiny else Shape()), Recipe(compiled=compiled), parts, plan)
        write(out, "training_proof", found, place)  # after every size: a run that is cut off leaves what it has
        with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
            torch.cuda.empty_cache()
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="foveal.pipelines.train_vision", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files, at any depth")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="of training per run")
    length.add_argument("--steps", type=int, help="of training per run")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for trying it on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, nargs="+", help="pixels a side; default all sizes")
    parser.add_argument("--rounds", type=int, help="of timing, exactly so many")
    parser.add_argument("--timing-seconds", type=float, default=2.0, help="of timing per size")
    parser.add_argument("--tested", type=int, help="only so many test pictures")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="the blocks of both models")
    print(run(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
