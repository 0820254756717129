"""What a run says while it works: lines and progress bars on stderr, or nothing.

Notable choices
- stdout belongs to results; everything here goes to stderr, so `--json` output stays pure.
- A bar appears for every stretch of work; on a terminal it is live, elsewhere only the lines are printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Tick = Callable[..., None]  # one unit is done; it may be told what it was about


class Voice(Protocol):
    """What the engine needs from whoever listens."""

    def say(self, text: str) -> None:
        """One line."""
        ...

    def bar(self, text: str, total: int) -> AbstractContextManager[Tick]:
        """A context that gives a function to call once per finished unit; the unit may name what it is about."""
        ...


class Quiet:
    """Says nothing."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Tick]:
        yield lambda about=None: None


class Rich:
    """Lines and bars on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Tick]:
        if total < 1:
            yield lambda about=None: None
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(text, total=total)

            def tick(about: str | None = None) -> None:
                progress.update(task, advance=1, description=f"{text}: {about}" if about else None)

            yield tick
