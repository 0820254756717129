"""The words of the emoji world: what a prompt may say, and the ids the model was trained on.

    a large fox on a mint plain background
    a small fox left of a large rose on a navy checker background

Notable choices
- A prompt is slots, not free text: two pictures with their scales, a relation, the scene, and the canvas (which of the
  trained frame sizes; the pipeline fills it in).
- Word order in `VOCAB` is part of the weights: never reorder, only append. Id 0 is the null word; all slots null is the
  unconditional prompt.
- Lengths are multiples of 1/64 of the frame, so that at 64, 128 and 256 pixels every picture lies on whole pixels.

B samples; attributes are [B, 7] int64: picture, scale, relation, picture, scale, style, background, -1 for what is not
there.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveal.pipelines.emoji.pictures import NAMES
from foveal.pipelines.errors import UserError

RGB = tuple[float, float, float]

BACKGROUNDS: dict[str, RGB] = {
    "cream": (0.96, 0.92, 0.82),
    "pink": (0.95, 0.72, 0.78),
    "sky": (0.62, 0.80, 0.95),
    "mint": (0.66, 0.88, 0.74),
    "navy": (0.10, 0.12, 0.25),
    "charcoal": (0.20, 0.20, 0.23),
}
STYLES: tuple[str, ...] = ("plain", "checker", "striped")
RELATIONS: dict[str, tuple[int, int]] = {  # where the first picture is, seen from the second; x right, y down
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
UNITS = 64  # lengths are whole multiples of 1 / UNITS of the frame
SCALES: dict[str, int] = {"small": 32, "large": 48}  # edge of a picture alone in the frame
PAIR_SCALES: dict[str, int] = {"small": 20, "large": 28}  # the same of two pictures
CANVASES: tuple[int, ...] = (64, 128, 256)  # trained frame sizes in pixels

NULL = "<null>"
VOCAB: tuple[str, ...] = (
    NULL,
    *NAMES,
    *SCALES,
    *RELATIONS,
    *STYLES,
    *BACKGROUNDS,
    *(f"{size} px" for size in CANVASES),
)
FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (  # columns of the attributes
    ("picture", NAMES),
    ("scale", tuple(SCALES)),
    ("relation", tuple(RELATIONS)),
    ("picture", NAMES),
    ("scale", tuple(SCALES)),
    ("style", STYLES),
    ("background", tuple(BACKGROUNDS)),
)
A, SCALE_A, RELATION, B, SCALE_B, STYLE, BACKGROUND = range(len(FIELDS))
N_SLOTS = len(FIELDS) + 1  # the last slot is the canvas

GRAMMAR = (
    "a small|large {picture} [left of|right of|above|below a small|large {picture}] "
    "on a {background} [plain|checker|striped] background"
)
_PATTERN = re.compile(
    r"an? (?P<scale_a>\S+) (?P<a>.+?)"
    r"(?: (?P<relation>left of|right of|above|below) an? (?P<scale_b>\S+) (?P<b>.+?))?"
    r" on an? (?P<background>\S+)(?: (?P<style>\S+))? background"
)


class PromptError(UserError, ValueError):
    """A prompt outside the grammar."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture, or two and the relation of the first to the second."""

    a: str
    scale_a: str
    background: str
    style: str = "plain"
    relation: str | None = None
    b: str | None = None
    scale_b: str | None = None

    @property
    def prompt(self) -> str:
        other = f" {self.relation} a {self.scale_b} {self.b}" if self.b else ""
        return f"a {self.scale_a} {self.a}{other} on a {self.background} {self.style} background"

    @property
    def columns(self) -> tuple[int, ...]:
        """The scene as a row of the attributes."""
        words = (self.a, self.scale_a, self.relation, self.b, self.scale_b, self.style, self.background)
        return tuple(-1 if word is None else known.index(word) for word, (_, known) in zip(words, FIELDS, strict=True))


def parse(prompt: str) -> Scene:
    """A prompt as a scene. Raises PromptError, which names the word and the nearest known one, or the grammar."""
    found = _PATTERN.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if found is None:
        raise PromptError(f"prompt {prompt!r} does not fit the grammar: write {GRAMMAR!r}.")
    words = {key: value for key, value in found.groupdict().items() if value is not None}
    kinds = {"a": NAMES, "b": NAMES, "scale_a": SCALES, "scale_b": SCALES, "relation": RELATIONS}
    kinds |= {"background": BACKGROUNDS, "style": STYLES}
    for key, word in words.items():
        _known(prompt, key.split("_")[0], word, tuple(kinds[key]))
    if words.get("b") == words["a"]:
        raise PromptError(f"prompt {prompt!r} names {words['a']!r} twice: use two different pictures.")
    return Scene(**words)


def _known(prompt: str, kind: str, word: str, known: Sequence[str]) -> None:
    if word in known:
        return
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
    kind = {"a": "picture", "b": "picture"}.get(kind, kind)
    more = f"{len(known)} known, in foveal.pipelines.emoji.pictures" if len(known) > 20 else ", ".join(known)
    raise PromptError(f"prompt {prompt!r}: unknown {kind} {word!r} (nearest: {near!r}; {more}).")


def attributes_of(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Scenes -> [B, 7] int64"""
    return torch.tensor([scene.columns for scene in scenes], device=device).view(-1, len(FIELDS))


def scenes_of(attributes: Tensor) -> list[Scene]:
    """[B, 7] -> scenes"""
    keys = ("a", "scale_a", "relation", "b", "scale_b", "style", "background")
    rows = attributes.tolist()
    pick = [[None if i < 0 else known[i] for i, (_, known) in zip(row, FIELDS, strict=True)] for row in rows]
    return [Scene(**dict(zip(keys, row, strict=True))) for row in pick]  # type: ignore[arg-type]


def canvas_of(size: int) -> int:
    """Index of the trained frame size nearest to `size` (by ratio)."""
    return min(range(len(CANVASES)), key=lambda i: abs(math.log(size / CANVASES[i])))


def word_ids(attributes: Tensor, size: int) -> Tensor:
    """[B, 7] attributes and the frame size -> [B, 8] word ids, 0 for null"""
    ids = torch.where(attributes < 0, 0, attributes + _first_ids(attributes.device))
    canvas = torch.full_like(ids[:, :1], len(VOCAB) - len(CANVASES) + canvas_of(size))
    return torch.cat([ids, canvas], 1)


@lru_cache(maxsize=8)
def _first_ids(device: torch.device) -> Tensor:
    """Id of the first word of each column, made once per device.  -> [7]"""
    return torch.tensor([VOCAB.index(known[0]) for _, known in FIELDS], device=device)
