"""Fixed prompts for validation, and the combinations that training never sees.

Notable choices
- 18 of the 360 (colour, shape, motion) triples are held out of training, for a score of compositional
  generalisation. The list is part of the shipped weights; it was drawn once (`torch.randperm(360)` with seed 20,
  the first 18).
- `VALIDATION_PROMPTS` are 64 prompts of seen triples, balanced over every attribute, so that any prefix covers the
  vocabulary evenly; `HELD_OUT_PROMPTS` are two prompts for each held-out triple.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from foveal.pipelines.world.pair_prompts import HELD_OUT_PAIR_PROMPTS, PAIR_PROMPTS
from foveal.pipelines.world.vocabulary import FIELDS, OBJECT_FIELDS

HELD_OUT_TRIPLES: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("red", "ring", "still"),
        ("red", "cross", "down"),
        ("green", "square", "left"),
        ("green", "triangle", "down-left"),
        ("green", "cross", "up"),
        ("green", "cross", "down-right"),
        ("blue", "circle", "up"),
        ("blue", "square", "up-left"),
        ("purple", "circle", "up-right"),
        ("purple", "square", "down-right"),
        ("cyan", "triangle", "down-left"),
        ("cyan", "cross", "up"),
        ("cyan", "cross", "up-right"),
        ("orange", "circle", "down-right"),
        ("orange", "triangle", "still"),
        ("orange", "ring", "down"),
        ("white", "triangle", "left"),
        ("white", "ring", "left"),
    }
)

VALIDATION_PROMPTS: tuple[str, ...] = (
    "a large blue ring standing still on a black plain background",
    "a small purple square moving up-left on a forest striped background",
    "a small yellow cross moving down on a navy checker background",
    "a large white circle moving down-right on a gray checker background",
    "a large orange triangle moving up on a navy striped background",
    "a small cyan triangle moving right on a gray plain background",
    "a large red ring moving up-right on a forest checker background",
    "a small green square moving down-left on a black plain background",
    "a small blue circle moving left on a navy striped background",
    "a large green cross moving up-right on a gray striped background",
    "a large cyan cross moving left on a black checker background",
    "a large yellow circle moving down on a forest plain background",
    "a small orange triangle moving down-left on a forest checker background",
    "a small white ring moving down-right on a navy plain background",
    "a large red square moving right on a black striped background",
    "a small purple circle standing still on a gray striped background",
    "a large purple square moving up on a navy checker background",
    "a small red cross moving up-left on a forest plain background",
    "a small green triangle moving up-right on a black checker background",
    "a large cyan ring moving right on a gray striped background",
    "a large yellow square moving left on a gray plain background",
    "a small white cross standing still on a forest striped background",
    "a large orange triangle moving down-right on a navy plain background",
    "a small red circle moving up on a black checker background",
    "a small blue ring moving down on a black striped background",
    "a large white ring moving up-left on a gray checker background",
    "a large orange circle moving down-left on a forest plain background",
    "a small blue square moving up-right on a navy plain background",
    "a large green triangle standing still on a navy striped background",
    "a small cyan square moving down-right on a forest checker background",
    "a small yellow cross moving up on a gray plain background",
    "a large purple cross moving down-left on a black checker background",
    "a large cyan triangle moving up-left on a black striped background",
    "a small orange ring moving left on a gray striped background",
    "a small yellow ring moving right on a navy checker background",
    "a large purple circle moving down on a gray plain background",
    "a small blue triangle moving right on a forest checker background",
    "a large red square moving down-left on a navy striped background",
    "a large white circle moving left on a forest plain background",
    "a small cyan cross moving down-right on a black plain background",
    "a small green circle standing still on a navy checker background",
    "a large white cross moving down on a forest striped background",
    "a small orange square moving up-right on a black plain background",
    "a large blue triangle standing still on a gray checker background",
    "a large purple ring moving up on a black striped background",
    "a small red circle moving up-left on a gray plain background",
    "a small yellow square moving up on a forest striped background",
    "a large orange cross moving down on a navy checker background",
    "a large green ring moving up-left on a forest checker background",
    "a small white triangle moving down-left on a gray striped background",
    "a large green circle moving right on a black plain background",
    "a small red ring moving left on a navy striped background",
    "a large purple triangle moving up-right on a forest plain background",
    "a large blue square moving down-right on a gray checker background",
    "a small cyan cross moving left on a navy plain background",
    "a large yellow circle moving up-left on a black striped background",
    "a small purple triangle moving down-right on a black checker background",
    "a small green ring moving down on a forest plain background",
    "a large yellow square standing still on a gray checker background",
    "a small orange cross moving up-right on a navy striped background",
    "a large cyan ring moving down-left on a navy plain background",
    "a small white circle moving right on a black striped background",
    "a small blue triangle moving up on a gray plain background",
    "a large green cross moving left on a forest checker background",
)

HELD_OUT_PROMPTS: tuple[str, ...] = (
    "a small red ring standing still on a black plain background",
    "a large red cross moving down on a gray checker background",
    "a small green square moving left on a navy striped background",
    "a large green triangle moving down-left on a forest plain background",
    "a small green cross moving up on a gray checker background",
    "a large green cross moving down-right on a navy striped background",
    "a small blue circle moving up on a forest plain background",
    "a large blue square moving up-left on a black checker background",
    "a small purple circle moving up-right on a navy striped background",
    "a large purple square moving down-right on a forest plain background",
    "a small cyan triangle moving down-left on a black checker background",
    "a large cyan cross moving up on a gray striped background",
    "a small cyan cross moving up-right on a forest plain background",
    "a large orange circle moving down-right on a black checker background",
    "a small orange triangle standing still on a gray striped background",
    "a large orange ring moving down on a navy plain background",
    "a small white triangle moving left on a black checker background",
    "a large white ring moving left on a gray striped background",
    "a large red ring standing still on a navy checker background",
    "a small red cross moving down on a forest striped background",
    "a large green square moving left on a black plain background",
    "a small green triangle moving down-left on a gray checker background",
    "a large green cross moving up on a forest striped background",
    "a small green cross moving down-right on a black plain background",
    "a large blue circle moving up on a gray checker background",
    "a small blue square moving up-left on a navy striped background",
    "a large purple circle moving up-right on a black plain background",
    "a small purple square moving down-right on a gray checker background",
    "a large cyan triangle moving down-left on a navy striped background",
    "a small cyan cross moving up on a forest plain background",
    "a large cyan cross moving up-right on a gray checker background",
    "a small orange circle moving down-right on a navy striped background",
    "a large orange triangle standing still on a forest plain background",
    "a small orange ring moving down on a black checker background",
    "a large white triangle moving left on a navy striped background",
    "a small white ring moving left on a forest plain background",
)


def validation_prompts(n: int = 64, held_out: bool = False, objects: int = 1) -> list[str]:
    """The first n fixed prompts.

    objects: 1, 2, or 0 for both kinds in turn (32 of one object, 32 of two). held_out: of held-out triples instead of
    triples seen in training (with objects = 2, one object of the two).  At most 64, held out at most 36.
    """
    one = HELD_OUT_PROMPTS if held_out else VALIDATION_PROMPTS
    two = HELD_OUT_PAIR_PROMPTS if held_out else PAIR_PROMPTS
    turns = tuple(prompt for both in zip(one, two, strict=True) for prompt in both)[: len(one)]
    if objects not in (0, 1, 2):
        raise ValueError(f"prompts with {objects} objects were asked for: use 1, 2, or 0 for both kinds.")
    prompts = (turns, one, two)[objects]
    if not 1 <= n <= len(prompts):
        kind = "held-out" if held_out else "validation"
        raise ValueError(f"{n} {kind} prompts were asked for: there are 1 to {len(prompts)}.")
    return list(prompts[:n])


@lru_cache(maxsize=2)
def triples(held_out: bool) -> tuple[tuple[int, int, int], ...]:
    """(colour, shape, motion) indices of the triples in training, or of those held out."""
    colours, shapes, motions = FIELDS["colour"], FIELDS["shape"], FIELDS["motion"]
    every = ((c, s, m) for c in range(len(colours)) for s in range(len(shapes)) for m in range(len(motions)))
    return tuple(t for t in every if ((colours[t[0]], shapes[t[1]], motions[t[2]]) in HELD_OUT_TRIPLES) == held_out)


def draw_attributes(n: int, generator: torch.Generator, held_out: bool = False, pairs: float = 0.0) -> Tensor:
    """Random scenes.  -> [n, 10] int64 on the generator's device, uniform over triples (the seen ones by default)

    pairs: share of scenes with a second object, of another colour and of the same kind of triples.
    """
    device = generator.device

    def below(high: int) -> Tensor:
        return torch.randint(0, high, (n,), generator=generator, device=device)

    def uniform() -> Tensor:
        return torch.rand(n, generator=generator, device=device)

    pool, first, count = triple_table(held_out, device)
    colour, shape, motion = pool[below(len(pool))].unbind(1)
    size, style, background = (below(len(FIELDS[field])) for field in ("size", "style", "background"))
    one = torch.stack([size, colour, shape, motion, style, background], 1)
    if pairs <= 0:
        return torch.cat([one, one.new_full((n, len(OBJECT_FIELDS)), -1)], 1)
    other = (uniform() * (len(pool) - count[colour])).long()  # skips the block of the first object's colour
    other = pool[other + (other >= first[colour]) * count[colour]]
    second = torch.cat([below(len(FIELDS["size"]))[:, None], other], 1)
    return torch.cat([one, torch.where((uniform() < pairs)[:, None], second, -1)], 1)


@lru_cache(maxsize=16)
def triple_table(held_out: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`triples`, sorted by colour, on one device, made once.  -> [342 or 18, 3], first row and rows of each colour [8]"""
    table = torch.tensor(triples(held_out), device=device)
    count = torch.bincount(table[:, 0], minlength=len(FIELDS["colour"]))
    return table, count.cumsum(0) - count, count
