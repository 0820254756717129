"""Drawing scenes for training and evaluation, and the combinations that training never sees.

Notable choices
- Held out, 5 % each: (picture, background) pairs, and (picture, relation, picture) triples. "A left of B" and "B right of
  A" are one triple. Which ones is a fixed arithmetic hash, so there is no list to ship.
- Everything is drawn on the generator's device with static shapes: TRIES candidates a scene, the first allowed one is
  taken; that none is allowed happens once in 10^10 scenes (seen scenes).

B samples; attributes [B, 7] as in `vocabulary`; positions [B, 2, 2] int64, (picture, x or y), upper left corners in 1/64
of the frame
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveal.pipelines.emoji.pictures import NAMES
from foveal.pipelines.emoji.vocabulary import (
    BACKGROUND,
    BACKGROUNDS,
    FIELDS,
    PAIR_SCALES,
    RELATION,
    RELATIONS,
    SCALE_A,
    SCALE_B,
    SCALES,
    STYLES,
    UNITS,
    A,
    B,
)

PAIRS = 0.5  # share of scenes with two pictures
ONE_IN = 20  # share of combinations that is held out
TRIES = 12
HELD_OUT_TRIES = 256
MARGIN, GAP, SWAY = 1, 2, 8  # from the border, between two pictures, across their axis; in 1/64


def held_out(attributes: Tensor) -> Tensor:
    """Whether a scene holds a combination that training never sees.  [..., 7] -> [...] bool"""
    a, b, relation = attributes[..., A], attributes[..., B], attributes[..., RELATION]
    background = attributes[..., BACKGROUND]
    paired = b >= 0
    swapped = (relation == 1) | (relation == 3)  # "right of" and "below" are "left of" and "above" from the other side
    first, second = torch.where(swapped, b, a), torch.where(swapped, a, b)
    triple = _hash(first, second, relation // 2) % ONE_IN == 0
    on = (_hash(a, background, 7) % ONE_IN == 0) | (paired & (_hash(b, background, 7) % ONE_IN == 0))
    return on | (paired & triple)


def draw_attributes(n: int, generator: torch.Generator, held: bool = False, pairs: float = PAIRS) -> Tensor:
    """Random scenes, all of seen combinations or all with a held-out one.  -> [n, 7] on the generator's device"""
    tries, device = HELD_OUT_TRIES if held else TRIES, generator.device
    paired = torch.rand(n, 1, generator=generator, device=device) < pairs
    candidates = _candidates(paired.expand(n, tries).reshape(-1), generator).view(n, tries, -1)
    return candidates[torch.arange(n, device=device), (held_out(candidates) == held).int().argmax(1)]


def draw_positions(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Where the pictures lie, drawn so that each is whole and the relation is plain.  -> [B, 2, 2]"""
    n, device = len(attributes), generator.device
    u = torch.rand(n, 4, generator=generator, device=device)
    edge_a, edge_b = edges(attributes)
    alone = MARGIN + (u[:, :2] * (UNITS - 2 * MARGIN + 1 - edge_a[:, None])).long()
    free = UNITS - 2 * MARGIN - GAP - edge_a - edge_b
    low, high = (u[:, :2].sort(1).values * (free[:, None] + 1)).long().unbind(1)
    relation = attributes[:, RELATION]
    swapped, upright = (relation == 1) | (relation == 3), relation >= 2
    edge_1, edge_2 = torch.where(swapped, edge_b, edge_a), torch.where(swapped, edge_a, edge_b)
    along = torch.stack([MARGIN + low, MARGIN + low + edge_1 + GAP + high - low], 1)  # of the first, of the second
    middle = UNITS // 2 - SWAY + (u[:, 2:] * (2 * SWAY + 1)).long()
    across = middle - torch.stack([edge_1, edge_2], 1) // 2
    xy = torch.where(upright[:, None, None], torch.stack([across, along], 2), torch.stack([along, across], 2))
    xy = torch.where(swapped[:, None, None], xy.flip(1), xy)
    single = torch.stack([alone, torch.zeros_like(alone)], 1)
    return torch.where((attributes[:, B] >= 0)[:, None, None], xy, single)


def edges(attributes: Tensor) -> tuple[Tensor, Tensor]:
    """Edge of each picture in 1/64 of the frame, 0 for a second one that is not there.  -> [B], [B]"""
    one, two = constants(attributes.device).edges
    paired = attributes[:, B] >= 0
    a, b = attributes[:, SCALE_A], attributes[:, SCALE_B].clamp(min=0)
    return torch.where(paired, two[a], one[a]), torch.where(paired, two[b], 0)


@dataclass(frozen=True, slots=True)
class Constants:
    """Small tables on one device: a copy to a GPU in every step would make the CPU wait for it."""

    edges: tuple[Tensor, Tensor]  # of one picture and of two, by scale, in 1/64 of the frame
    second: Tensor  # [7] bool, columns of the second picture


@lru_cache(maxsize=8)
def constants(device: torch.device) -> Constants:
    """The tables, made once per device."""
    one, two = (torch.tensor(list(table.values()), device=device) for table in (SCALES, PAIR_SCALES))
    second = [column in (RELATION, B, SCALE_B) for column in range(len(FIELDS))]
    return Constants((one, two), torch.tensor(second, device=device))


def _candidates(paired: Tensor, generator: torch.Generator) -> Tensor:
    """Any scenes, with two pictures where `paired` [n] says so.  -> [n, 7]"""
    n, device = len(paired), generator.device

    def below(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator, device=device)

    a, b = below(len(NAMES)), below(len(NAMES) - 1)
    b = b + (b >= a)  # two different pictures
    columns = [a, below(len(SCALES)), below(len(RELATIONS)), b, below(len(PAIR_SCALES)), below(len(STYLES))]
    attributes = torch.stack([*columns, below(len(BACKGROUNDS))], 1)
    return torch.where(~paired[:, None] & constants(device).second, -1, attributes)


def _hash(a: Tensor, b: Tensor, c: Tensor | int) -> Tensor:
    """A fixed mixture of small integers, at least 0."""
    x = (a + 1) * 73856093 ^ (b + 1) * 19349663 ^ (c + 1) * 83492791
    x = (x ^ (x >> 15)) * 2246822519 % 4294967296
    x = (x ^ (x >> 13)) * 3266489917 % 4294967296
    return (x ^ (x >> 16)) % 1000003
