"""The words of the world: what a prompt may say, and the ids the models were trained on.

Notable choices
- A prompt is ten slots, not free text: slots 0-3 describe the first object, 4-7 a second one, 8-9 the scene. The
  shipped models saw one object, so slots 4-7 are always null today and the parser refuses a second object.
- Word order in `VOCAB` is part of the weights: never reorder, only append. Id 0 is the null word; all slots null is
  the unconditional prompt.
- `Scene` is the value everything passes around; `attributes` is the same thing as six small integers, for tensors.

B clips
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.pipelines.errors import UserError

RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.70, 0.25),
    "blue": (0.15, 0.35, 0.95),
    "yellow": (0.95, 0.80, 0.15),
    "purple": (0.75, 0.25, 0.85),
    "cyan": (0.15, 0.80, 0.85),
    "orange": (0.95, 0.55, 0.15),
    "white": (0.95, 0.95, 0.95),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (0.05, 0.05, 0.08),
    "gray": (0.25, 0.25, 0.28),
    "navy": (0.10, 0.12, 0.25),
    "forest": (0.12, 0.22, 0.12),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "ring", "cross")
SIZES: dict[str, float] = {"small": 0.16, "large": 0.26}  # radius, as a fraction of the frame
MOTIONS: dict[str, tuple[int, int]] = {  # direction, x to the right, y down
    "still": (0, 0),
    "right": (1, 0),
    "left": (-1, 0),
    "down": (0, 1),
    "up": (0, -1),
    "down-right": (1, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
}
STYLES: tuple[str, ...] = ("plain", "checker", "striped")

FIELDS: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": tuple(MOTIONS),
    "style": STYLES,
    "background": tuple(BACKGROUNDS),
}
NULL = "<null>"
VOCAB: tuple[str, ...] = (NULL, *(word for words in FIELDS.values() for word in words))
N_SLOTS = 10
SLOTS: dict[str, int] = {"size": 0, "colour": 1, "shape": 2, "motion": 3, "style": 8, "background": 9}
SECOND_OBJECT_SLOTS: tuple[int, ...] = (4, 5, 6, 7)

GRAMMAR = "a {size} {colour} {shape} moving {direction}|standing still on a {background} {style} background"
_PROMPT = re.compile(
    r"a (?P<size>\S+) (?P<colour>\S+) (?P<shape>\S+) (?P<motion>moving \S+|standing still)"
    r" on a (?P<background>\S+) (?P<style>\S+) background"
)
_GLUE = frozenset({"a", "and", "moving", "standing", "on", "background"})


class PromptError(UserError):
    """A prompt outside the grammar. The message is one sentence that says how to fix it."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip's content: an object (size, colour, shape, motion) on a background (style, background).

    Every field is a word of `FIELDS[field]`; anything else raises `PromptError` naming the nearest word.
    """

    size: str
    colour: str
    shape: str
    motion: str
    style: str
    background: str

    def __post_init__(self) -> None:
        for field, words in FIELDS.items():
            word = getattr(self, field)
            if word not in words:
                raise PromptError(f"{word!r} is not a {field}: use one of {', '.join(words)}{_nearest(word, words)}.")

    @property
    def attributes(self) -> tuple[int, ...]:
        """Six indices, in the order of `FIELDS`."""
        return tuple(words.index(getattr(self, field)) for field, words in FIELDS.items())

    @classmethod
    def from_attributes(cls, attributes: Sequence[int]) -> Scene:
        """The inverse of `attributes`."""
        return cls(**{field: words[int(i)] for (field, words), i in zip(FIELDS.items(), attributes, strict=True)})


def parse(prompt: str) -> Scene:
    """Read a prompt of exactly this form (one object; single spaces, lower case):

        a {size} {colour} {shape} moving {direction}|standing still on a {background} {style} background

    >>> parse("a small red circle moving up-left on a navy striped background").motion
    'up-left'

    Raises `PromptError`: an unknown word (with the nearest known one and the vocabulary), a second object, or known
    words in the wrong order.
    """
    known = _GLUE.union(VOCAB[1:])
    unknown = [word for word in prompt.split() if word not in known]
    if unknown:
        word = unknown[0]
        raise PromptError(f"unknown word {word!r} in prompt {prompt!r}{_nearest(word, sorted(known))}; {_words()}.")
    if " and a " in prompt:
        raise PromptError(
            f"prompt {prompt!r} names two objects, but the shipped models know one: remove 'and a ...' up to 'on a'."
        )
    match = _PROMPT.fullmatch(prompt)
    if match is None or match["motion"] == "moving still":
        raise PromptError(f"prompt {prompt!r} does not follow the grammar: write {GRAMMAR!r}; {_words()}.")
    return Scene(**{**match.groupdict(), "motion": match["motion"].split()[1]})


def describe(scene: Scene) -> str:
    """The prompt of a scene; `parse(describe(scene)) == scene`."""
    motion = "standing still" if scene.motion == "still" else f"moving {scene.motion}"
    thing = f"a {scene.size} {scene.colour} {scene.shape}"
    return f"{thing} {motion} on a {scene.background} {scene.style} background"


def attributes_of(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Scenes as integers.  -> [B, 6] int64, columns in the order of `FIELDS`"""
    return torch.tensor([scene.attributes for scene in scenes], dtype=torch.long, device=device).view(-1, len(FIELDS))


def scenes_of(attributes: Tensor) -> list[Scene]:
    """[B, 6] integers -> scenes; the inverse of `attributes_of`."""
    return [Scene.from_attributes(row) for row in attributes.tolist()]


def word_ids(attributes: Tensor) -> Tensor:
    """[B, 6] attributes -> [B, 10] int64 word ids; the slots of a second object are null (0)."""
    ids = torch.zeros(attributes.shape[0], N_SLOTS, dtype=torch.long, device=attributes.device)
    offset = 1
    for column, (field, words) in enumerate(FIELDS.items()):
        ids[:, SLOTS[field]] = attributes[:, column] + offset
        offset += len(words)
    return ids


def _nearest(word: object, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.4)
    return f" (nearest: {close[0]!r})" if close else ""


def _words() -> str:
    return "the vocabulary is " + "; ".join(f"{field}: {', '.join(words)}" for field, words in FIELDS.items())
