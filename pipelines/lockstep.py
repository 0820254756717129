"""Several sampling runs step by step in turn, so that a machine that slows down slows all of them alike.

Notable choices
- One run goes at a time: each has a thread, and at the end of every step it hands a baton to the next. Nothing overlaps, so
  times are those of a run alone; the time a run spends waiting for the baton is reported and taken off.
- Each run needs a pipeline of its own. Models that are too large to copy are timed one after the other instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Another run failed or was interrupted; this one ends."""


class Baton:
    """Whose turn it is. Runs are numbered; a run that is done drops out."""

    def __init__(self, runs: int) -> None:
        self._free = threading.Condition()
        self._active = list(range(runs))
        self._turn = 0
        self._stopped = False
        self.waited = [0.0] * runs

    def wait(self, run: int) -> None:
        """Block until it is this run's turn; the time counts as waited."""
        start = time.perf_counter()
        with self._free:
            self._free.wait_for(lambda: self._stopped or self._turn == run)
            self.waited[run] += time.perf_counter() - start
            if self._stopped:
                raise Stopped

    def hand_on(self, run: int) -> None:
        """Give the turn to the next run and wait for it to come back."""
        self._pass(run)
        self.wait(run)

    def leave(self, run: int) -> None:
        """Drop out and give the turn to the next run."""
        self._pass(run)
        with self._free:
            self._active.remove(run)

    def stop(self) -> None:
        """End every run at its next turn."""
        with self._free:
            self._stopped = True
            self._free.notify_all()

    def _pass(self, run: int) -> None:
        with self._free:
            after = [r for r in self._active if r > run] or self._active
            self._turn = after[0]
            self._free.notify_all()


def in_turn(runs: Sequence[Callable[[Callable[[], None], Callable[[], float]], T]]) -> list[T]:
    """Run functions step by step in turn -> their results in order.

    Each takes (hand_on, waited): it calls hand_on() after every step, and waited() gives the seconds it has spent waiting.
    The first exception of any run, or Ctrl-C, ends all of them and is raised.
    """
    baton = Baton(len(runs))
    results: list[Any] = [None] * len(runs)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            baton.wait(i)
            baton.waited[i] = 0.0
            results[i] = runs[i](lambda: baton.hand_on(i), lambda: baton.waited[i])
        except Stopped:
            return
        except BaseException as err:
            errors.append(err)
            baton.stop()
        else:
            baton.leave(i)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.1)
    except BaseException:
        baton.stop()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
    return results
