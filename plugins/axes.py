"""Knobs given per axis: one number for all axes, or one per axis of the grid.

Axes of length 1 carry no choice: a knob may leave them out (2 numbers for a (1, H, W) grid), and what it says there is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveal.plugins.order import by
from foveal.plugins.site import MethodError

Ints = int | tuple[int, ...]


def checked_ints(name: str, value: Any, least: int, also: int | None = None) -> Ints:
    """A whole number, or 1 to 3 of them, each >= least (or equal to ``also``). Raises ``MethodError``."""
    many = isinstance(value, (tuple, list))
    entries = tuple(value) if many else (value,)
    exception = "" if also is None else f" or {also} (the whole axis)"
    fine = all(isinstance(x, int) and not isinstance(x, bool) and (x >= least or x == also) for x in entries)
    if not fine or not 1 <= len(entries) <= 3:
        raise MethodError(
            f"{name} is {value!r}; give a whole number >= {least}{exception}, or up to three of them, one per axis."
        )
    return entries if many else entries[0]


def checked_flags(name: str, value: Any) -> bool | tuple[bool, ...]:
    """True or False, or 1 to 3 of them. Raises ``MethodError``."""
    many = isinstance(value, (tuple, list))
    entries = tuple(value) if many else (value,)
    if not all(isinstance(x, bool) for x in entries) or not 1 <= len(entries) <= 3:
        raise MethodError(f"{name} is {value!r}; give True or False, or up to three of them, one per axis.")
    return entries if many else entries[0]


def per_axis(name: str, value: Any, grid: Sequence[int], single: Any) -> tuple[Any, ...]:
    """Spread a checked knob over the grid's axes; axes of length 1 get ``single``.

    Raises ``MethodError`` where the number of entries fits neither the grid nor its axes longer than 1.
    """
    entries = value if isinstance(value, tuple) else (value,) * len(grid)
    lead = len(grid) - len(entries)
    if lead < 0 or any(g > 1 for g in grid[:lead]):
        raise MethodError(f"{name} {value} has {len(entries)} entries; the grid {by(grid)} needs {len(grid)}.")
    entries = (single,) * lead + entries
    return tuple(single if g == 1 else x for x, g in zip(entries, grid, strict=True))
