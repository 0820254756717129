"""Choosing one of several implementations of an operator: by name, or the first in order of preference that takes the call."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

ORACLE = "reference"  # slow on purpose: taken only by name


@dataclass(frozen=True)
class Choice:
    """The implementation a call takes, and why the preferred ones before it cannot."""

    name: str
    skipped: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.name + "".join(f" ({name} skipped: {why})" for name, why in self.skipped)


def pick(
    known: Iterable[str], wanted: str | None, shape: tuple[int, ...], refusal: Callable[[str], str | None]
) -> Choice:
    """known: names in order of preference; wanted: one of them or None; refusal(name): why it cannot take the call, or None.

    Raises ValueError in one sentence for an unknown name (the nearest is suggested), when the wanted one cannot, or when none can.
    """
    names = list(known)
    if wanted is not None:
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"there is no implementation {wanted!r}{hint}; choose one of {', '.join(names)}.")
        why = refusal(wanted)
        if why:
            raise ValueError(
                f"the {wanted} implementation cannot take this call: {why}; leave implementation out, or change the input."
            )
        return Choice(wanted)
    skipped: list[tuple[str, str]] = []
    for name in names:
        if name == ORACLE:
            continue
        why = refusal(name)
        if why is None:
            return Choice(name, tuple(skipped))
        skipped.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in skipped)
    raise ValueError(f"no implementation takes q of shape {shape}: {reasons}.")
