"""The words of the world: what a prompt may say, and the ids the models were trained on.

Notable choices
- A prompt is ten slots, not free text: slots 0-3 describe the first object, 4-7 a second one (null: there is none),
  8-9 the scene. Two objects have different colours, so a clip says which is which.
- The language has two objects; how many a model knows is a fact of the model (`require_objects`).
- Word order in `VOCAB` is part of the weights: never reorder, only append. Id 0 is the null word; all slots null is
  the unconditional prompt.
- `Scene` is the value everything passes around; `attributes` is the same thing as ten small integers, for tensors:
  the six of `FIELDS`, then the four of `OBJECT_FIELDS` of the second object, -1 where there is none.

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
PAIR_SIZES: dict[str, float] = {"small": 0.10, "large": 0.17}  # the same of two objects in one clip
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
OBJECT_FIELDS: tuple[str, ...] = ("size", "colour", "shape", "motion")
SECOND_OBJECT_SLOTS: tuple[int, ...] = (4, 5, 6, 7)
SECOND = len(FIELDS)  # first of the second object's columns
COLUMNS = SECOND + len(OBJECT_FIELDS)

_OBJECT = "a {size} {colour} {shape} moving {direction}|standing still"
GRAMMAR = f"{_OBJECT} [and {_OBJECT}] on a {{background}} {{style}} background"
_THING = r"a (?P<size{0}>\S+) (?P<colour{0}>\S+) (?P<shape{0}>\S+) (?P<motion{0}>moving \S+|standing still)"
_PROMPT = re.compile(
    f"{_THING.format('')}(?: and {_THING.format('2')})?"
    r" on a (?P<background>\S+) (?P<style>\S+) background"
)
_GLUE = frozenset({"a", "and", "moving", "standing", "on", "background"})


class PromptError(UserError):
    """A prompt outside the grammar. The message is one sentence that says how to fix it."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: every field is a word of `FIELDS[field]`; anything else raises `PromptError`."""

    size: str
    colour: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        for field in OBJECT_FIELDS:
            _check_word(field, getattr(self, field))


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip's content: an object (size, colour, shape, motion) on a background (style, background), and perhaps a
    second object of another colour, drawn over the first.

    Every field is a word of `FIELDS[field]`; anything else raises `PromptError` naming the nearest word.
    """

    size: str
    colour: str
    shape: str
    motion: str
    style: str
    background: str
    second: Thing | None = None

    def __post_init__(self) -> None:
        for field in FIELDS:
            _check_word(field, getattr(self, field))
        if self.second is not None and self.second.colour == self.colour:
            raise PromptError(
                f"both objects are {self.colour}: two objects need different colours, change one of them."
            )

    @property
    def things(self) -> tuple[Thing, ...]:
        """The objects, in drawing order."""
        first = Thing(self.size, self.colour, self.shape, self.motion)
        return (first,) if self.second is None else (first, self.second)

    @property
    def attributes(self) -> tuple[int, ...]:
        """Ten indices: six in the order of `FIELDS`, four of the second object (-1 without one)."""
        first = [words.index(getattr(self, field)) for field, words in FIELDS.items()]
        if self.second is None:
            return (*first, *[-1] * len(OBJECT_FIELDS))
        return (*first, *(FIELDS[field].index(getattr(self.second, field)) for field in OBJECT_FIELDS))

    @classmethod
    def from_attributes(cls, attributes: Sequence[int]) -> Scene:
        """The inverse of `attributes`; the last four may be left out."""
        numbers = [int(i) for i in attributes]
        word = {field: words[i] for (field, words), i in zip(FIELDS.items(), numbers, strict=False)}
        rest, second = numbers[SECOND:], None
        if rest and rest[0] >= 0:
            second = Thing(*(FIELDS[field][i] for field, i in zip(OBJECT_FIELDS, rest, strict=True)))
        return cls.of(Thing(*(word[field] for field in OBJECT_FIELDS)), word["style"], word["background"], second)

    @classmethod
    def of(cls, first: Thing, style: str, background: str, second: Thing | None = None) -> Scene:
        """A scene of whole objects."""
        return cls(first.size, first.colour, first.shape, first.motion, style, background, second)


def parse(prompt: str) -> Scene:
    """Read a prompt of exactly this form (single spaces, lower case; the part in brackets may be left out):

        a {size} {colour} {shape} moving {direction}|standing still [and a ...] on a {background} {style} background

    >>> parse("a small red circle moving up-left on a navy striped background").motion
    'up-left'

    Raises `PromptError`: an unknown word (with the nearest known one and the vocabulary), two objects of one colour,
    or known words in the wrong order.
    """
    known = _GLUE.union(VOCAB[1:])
    unknown = [word for word in prompt.split() if word not in known]
    if unknown:
        word = unknown[0]
        raise PromptError(f"unknown word {word!r} in prompt {prompt!r}{_nearest(word, sorted(known))}; {_words()}.")
    match = _PROMPT.fullmatch(prompt)
    if match is None or "moving still" in (match["motion"], match["motion2"]):
        raise PromptError(f"prompt {prompt!r} does not follow the grammar: write {GRAMMAR!r}; {_words()}.")
    first, second = _thing(match, ""), None if match["size2"] is None else _thing(match, "2")
    return Scene.of(first, match["style"], match["background"], second)


def _thing(match: re.Match[str], number: str) -> Thing:
    size, colour, shape, motion = (match[f"{field}{number}"] for field in OBJECT_FIELDS)
    return Thing(size, colour, shape, motion.split(" ")[1])


def describe(scene: Scene) -> str:
    """The prompt of a scene; `parse(describe(scene)) == scene`."""

    def words(thing: Thing) -> str:
        motion = "standing still" if thing.motion == "still" else f"moving {thing.motion}"
        return f"a {thing.size} {thing.colour} {thing.shape} {motion}"

    return f"{' and '.join(map(words, scene.things))} on a {scene.background} {scene.style} background"


def require_objects(prompts: Sequence[str], objects: int, model: str = "this model") -> None:
    """Raises `PromptError` for the first prompt outside the grammar or with more objects than a model has seen."""
    for prompt in prompts:
        if len(parse(prompt).things) > objects:
            raise PromptError(
                f"prompt {prompt!r} names two objects, but {model} was trained on one: "
                "remove 'and a ...' up to 'on a', or take a model whose card says two objects."
            )


def attributes_of(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Scenes as integers.  -> [B, 10] int64, columns in the order of `FIELDS`, then the second object's (-1: none)"""
    return torch.tensor([scene.attributes for scene in scenes], dtype=torch.long, device=device).view(-1, COLUMNS)


def scenes_of(attributes: Tensor) -> list[Scene]:
    """[B, 10] integers -> scenes; the inverse of `attributes_of`."""
    return [Scene.from_attributes(row) for row in attributes.tolist()]


def word_ids(attributes: Tensor) -> Tensor:
    """[B, 10] attributes -> [B, 10] int64 word ids; the slots of an absent second object are null (0)."""
    ids = torch.zeros(attributes.shape[0], N_SLOTS, dtype=torch.long, device=attributes.device)
    offsets, offset = {}, 1
    for column, (field, words) in enumerate(FIELDS.items()):
        ids[:, SLOTS[field]] = attributes[:, column] + offset
        offsets[field] = offset
        offset += len(words)
    for column, (slot, field) in enumerate(zip(SECOND_OBJECT_SLOTS, OBJECT_FIELDS, strict=True)):
        value = attributes[:, SECOND + column]
        ids[:, slot] = torch.where(value < 0, 0, value + offsets[field])
    return ids


def _check_word(field: str, word: str) -> None:
    words = FIELDS[field]
    if word not in words:
        raise PromptError(f"{word!r} is not a {field}: use one of {', '.join(words)}{_nearest(word, words)}.")


def _nearest(word: object, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.4)
    return f" (nearest: {close[0]!r})" if close else ""


def _words() -> str:
    return "the vocabulary is " + "; ".join(f"{field}: {', '.join(words)}" for field, words in FIELDS.items())
