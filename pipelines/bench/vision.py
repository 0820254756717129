"""`bench vision`: ViG beside DeiT at several sizes of image, training, and LINA's attention module.

Groups of cases: "eager", "compiled", "training", "module", "small batches"; ``--cases`` takes groups or names of cases.

Notable choices
- The batch shrinks as images grow, so that the number of tokens stays near 260,000: enough that the GPU, not the host, is what limits.
  "small batches" are a quarter of it, where a slow host may decide; they have no goals.
- What is timed and how is said in image_models.py and lina_module.py. A case that cannot be set up at all is a row that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from foveal.pipelines.bench.image_models import Entrant, ImageCase, image_rows, line
from foveal.pipelines.bench.lina_module import ModuleCase, module_rows
from foveal.pipelines.bench.rounds import How, Rounds, reason
from foveal.pipelines.bench.rows import SHORT, Rows, row

Case = ImageCase | ModuleCase
DEIT_T, DEIT_B = Entrant(model="deit_tiny_patch16_224"), Entrant(model="deit_base_patch16_224")
VIG_T, VIG_S = Entrant(model="vig_tiny_patch16_224"), Entrant(model="vig_small_patch16_224")
SIZES = ((224, 1024, (0.75, 0.9)), (512, 256, (0.9, 1.1)), (1024, 64, (1.3, 1.6)), (2048, 16, (2.5, 3.7)))
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def _plain() -> Iterator[Case]:
    for size, batch, goal in SIZES:
        pair = (DEIT_T, replace(VIG_T, goal=goal))
        yield ImageCase(name=f"tiny, {size} pixels", group="eager", size=size, batch=batch, entrants=pair)
    pair = (DEIT_B, replace(VIG_S, goal=(1.6, 1.6)))
    yield ImageCase(name="ViG-S beside DeiT-B, 224 pixels", group="eager", size=224, batch=1024, entrants=pair)
    pair = (DEIT_T, replace(VIG_T, goal=(1.0, 1.4)))
    yield ImageCase(
        name="tiny, training, 1024 pixels", group="training", size=1024, batch=64, entrants=pair, training=True
    )
    yield ModuleCase(name="LINA's decoder attention, 1024 pixels", prefix=1024, image=4096, dim=1536, heads=16)
    for size, batch, goal in SIZES:
        pair = (DEIT_T, replace(VIG_T, goal=goal))
        name = f"tiny, {size} pixels, compiled"
        yield ImageCase(name=name, group="compiled", size=size, batch=batch, entrants=pair, compiled=True)
    for size, batch, _ in SIZES:
        name = f"tiny, {size} pixels, small batch"
        yield ImageCase(name=name, group="small batches", size=size, batch=batch // 4, entrants=(DEIT_T, VIG_T))


CASES: tuple[Case, ...] = tuple(_plain())
_PAIR = tuple(replace(e, knobs=SMALL) for e in (DEIT_T, VIG_T))
TINY: tuple[Case, ...] = (
    ImageCase(name="very small", group="eager", size=32, batch=2, entrants=_PAIR),
    ImageCase(name="very small, training", group="training", size=32, batch=2, entrants=_PAIR, training=True),
    ModuleCase(name="very small module", prefix=4, image=16, dim=32, heads=2),
)


def chosen(tiny: bool, wanted: Sequence[str] | None, known: Sequence[Case] | None = None) -> list[Case]:
    """The cases of these groups and names, or all. ValueError for a name that is neither."""
    known = list(known if known is not None else TINY if tiny else CASES)
    names = list(dict.fromkeys([case.group for case in known] + [case.name for case in known]))
    for name in wanted or ():
        if name not in names:
            raise ValueError(f"there is no case {name!r}; choose from {', '.join(names)}.")
    return [case for case in known if not wanted or case.group in wanted or case.name in wanted]


def rows_or_failure(run: Callable[[Any, How], Rows], case: Any, how: How) -> Rows:
    """The rows of a case; of one that could not be set up, a row with the reason."""
    try:
        return run(case, how)
    except Exception as error:
        failed = Rounds({}, {"none": reason(error)})
        return [row(case.name, case.group, "none", failed, None, shape={}, dtype=SHORT[how.dtype])]


def measure(
    device: torch.device, seconds: float, tiny: bool = False, cases: Sequence[str] | None = None, rounds: int | None = None
) -> Iterator[Rows]:  # fmt: skip
    """The rows of every case, case by case. seconds: of measuring per case."""
    how = How.on(device, seconds, rounds)
    for case in chosen(tiny, cases):
        yield rows_or_failure(image_rows if isinstance(case, ImageCase) else module_rows, case, how)
        if device.type == "cuda":
            torch.cuda.empty_cache()


__all__ = ["CASES", "TINY", "chosen", "line", "measure"]
