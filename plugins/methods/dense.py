"""Dense attention as a method: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveal.plugins.method import Method


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Every call stays with the host's own attention, and the record names it."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "every query sees every key: the baseline"
