"""Interleaved timing: every round calls each competitor once, so that drift of clocks and power meets all alike.

Notable choices
- The order changes from round to round, and the figure is the median over rounds; smallest and largest stand beside it.
- A competitor that fails is a finding, not a crash: it is left out of the rounds and keeps its reason.
- GPU events on a GPU, the wall clock on a CPU.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one competitor over rounds."""

    times: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.median(self.times)

    def facts(self) -> dict[str, Any]:
        return {"ms": self.ms, "ms_min": min(self.times), "ms_max": max(self.times), "rounds": len(self.times)}


@dataclass(frozen=True)
class Rounds:
    """timings: by competitor, in the order given; failed: reason by competitor."""

    timings: dict[str, Timing]
    failed: dict[str, str] = field(default_factory=dict)

    def fastest(self, names: list[str] | None = None) -> str:
        """The competitor with the smallest median among ``names``."""
        return min((n for n in self.timings if names is None or n in names), key=lambda n: self.timings[n].ms)


class Stopwatch:
    """Times of calls on one device. On a GPU nothing is waited for until the times are read."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self.marks.append((self._mark(), None))

    def stop(self) -> None:
        self.marks[-1] = (self.marks[-1][0], self._mark())

    def times(self) -> list[float]:
        """Milliseconds of every start and stop."""
        if self.gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in self.marks]
        return [1e3 * (b - a) for a, b in self.marks]

    def _mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextlib.contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    watch.start()
    yield
    watch.stop()


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The names in another order every round: who comes after a call that heats the card is not always the same."""
    shuffle = random.Random(0)
    for _ in range(rounds):
        yield shuffle.sample(names, len(names))


def interleaved(
    calls: dict[str, Call], device: torch.device, *, seconds: float = 2.0, least: int = 5, most: int = 40, warm: int = 2
) -> Rounds:
    """Time each call. About ``seconds`` of measuring in all, but at least ``least`` and at most ``most`` rounds, after ``warm`` calls each."""
    alive, failed, cost = dict(calls), {}, 0.0
    for name, call in calls.items():
        try:
            for _ in range(warm):
                call()
            watch = Stopwatch(device)
            with watched(watch):
                call()
            cost += watch.times()[0]
        except Exception as error:
            failed[name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else 'no message'}"
            )
            del alive[name]
    rounds = int(min(most, max(least, seconds * 1e3 / max(1e-3, cost)))) if alive else 0
    watches = {name: Stopwatch(device) for name in alive}
    for names in orders(list(alive), rounds):
        for name in names:
            with watched(watches[name]):
                alive[name]()
    return Rounds({name: Timing(tuple(watch.times())) for name, watch in watches.items()}, failed)


def host_microseconds(call: Call, device: torch.device, calls: int = 100) -> float:
    """Host time of one call after warm-up, in microseconds: what a caller waits before the next line of Python."""
    for _ in range(5):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * spent / calls
