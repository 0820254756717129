"""Direct labels beside points, placed so that they do not cover each other, the points or the error bars.

* Greedy and deterministic: points from left to right, each takes the cheapest of a fixed list of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHAR, HEIGHT = 8.0, 15.0  # generous width of a character and height of a line at 13 px
_SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_RINGS = (10.0, 20.0, 34.0, 52.0, 74.0, 100.0)


@dataclass(frozen=True)
class Rect:
    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: Rect) -> float:
        """Shared area."""
        w = min(self.x1, other.x1) - max(self.x0, other.x0)
        h = min(self.y1, other.y1) - max(self.y0, other.y0)
        return w * h if w > 0 and h > 0 else 0.0

    def outside(self, area: Rect) -> float:
        """Area of this rectangle that lies outside ``area``."""
        return (self.x1 - self.x0) * (self.y1 - self.y0) - self.overlap(area)


@dataclass(frozen=True)
class Label:
    """box: where the text stands; leader: whether it is far enough from its point to need a line."""

    text: str
    box: Rect
    leader: bool


def place(points: Sequence[tuple[float, float, str]], area: Rect, obstacles: Sequence[Rect] = ()) -> list[Label]:
    """Labels for points (x, y, text) inside ``area``, in the order of ``points``."""
    taken = [*obstacles, *(Rect(x - 8, y - 8, x + 8, y + 8) for x, y, _ in points)]
    out: dict[int, Label] = {}
    for i in sorted(range(len(points)), key=lambda j: (points[j][0], points[j][1], j)):
        x, y, text = points[i]
        best = min(
            (
                (_cost(box, ring, order, area, taken), order, box, ring)
                for order, (box, ring) in enumerate(_candidates(x, y, text))
            ),
            key=lambda c: c[:2],
        )
        out[i] = Label(text, best[2], best[3] > _RINGS[1])
        taken.append(best[2])
    return [out[i] for i in range(len(points))]


def _candidates(x: float, y: float, text: str) -> list[tuple[Rect, float]]:
    w, h = CHAR * len(text), HEIGHT
    out = []
    for ring in _RINGS:
        for dx, dy in _SIDES:
            reach = ring if dx == 0 or dy == 0 else 0.75 * ring
            x0 = x + dx * reach - (w if dx < 0 else w / 2 if dx == 0 else 0)
            y0 = y + dy * (reach + (h / 2 if dy else 0)) - h / 2
            out.append((Rect(x0, y0, x0 + w, y0 + h), ring))
    return out


def _cost(box: Rect, ring: float, order: int, area: Rect, taken: Sequence[Rect]) -> float:
    return 40 * box.outside(area) + 10 * sum(box.overlap(t) for t in taken) + 0.5 * ring + 0.01 * order
