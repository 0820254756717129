"""Interleaved timing: every round calls each competitor once, so that drift of clocks and power meets all alike.

Notable choices
- The order changes from round to round, and the figure is the median over rounds; smallest and largest stand beside it.
- A competitor that fails is a finding, not a crash: it is left out of the rounds from then on and keeps its reason.
- GPU events on a GPU, the wall clock on a CPU.
- Two competitors are compared round by round where the difference is small: drift cancels inside a round.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator
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

    def fastest(self, names: Collection[str] | None = None) -> str | None:
        """The competitor with the smallest median among ``names``; None where none of them ran."""
        ran = [n for n in self.timings if names is None or n in names]
        return min(ran, key=lambda n: self.timings[n].ms, default=None)

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Time of ``name`` over time of ``base`` in the same round: median, lower and upper quartile over rounds."""
        pairs = zip(self.timings[name].times, self.timings[base].times, strict=True)
        ratios = sorted(a / b for a, b in pairs)
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


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


def how_many(milliseconds: float, seconds: float, rounds: int | None, least: int = 5, most: int = 40) -> int:
    """Rounds of that cost each in about ``seconds``, at least ``least`` and at most ``most``; or ``rounds`` where it is given."""
    if rounds is not None:
        return rounds
    return int(min(most, max(least, seconds * 1e3 / max(1e-3, milliseconds))))


def reason(error: Exception) -> str:
    """An error on one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"


def interleaved(
    calls: dict[str, Call], device: torch.device, *, seconds: float = 2.0, rounds: int | None = None, least: int = 5,
    most: int = 40, warm: int = 2,
) -> Rounds:  # fmt: skip
    """Time each call: about ``seconds`` of measuring in all, or ``rounds`` rounds, after ``warm`` calls each and one for its cost."""
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
            failed[name] = reason(error)
            del alive[name]
    watches = {name: Stopwatch(device) for name in alive}
    for names in orders(list(alive), how_many(cost, seconds, rounds, least, most) if alive else 0):
        for name in names:
            if name in failed:
                continue
            try:
                with watched(watches[name]):
                    alive[name]()
            except Exception as error:
                failed[name] = reason(error)
    timings = {name: Timing(tuple(watch.times())) for name, watch in watches.items() if name not in failed}
    return Rounds(timings, failed)


@dataclass(frozen=True)
class How:
    """How a case is measured. seconds: in all, unless ``rounds`` says how many; dtype of the tensors."""

    device: torch.device
    dtype: torch.dtype
    seconds: float = 2.0
    rounds: int | None = None

    @staticmethod
    def on(device: torch.device, seconds: float = 2.0, rounds: int | None = None) -> How:
        """bf16 on a GPU, fp32 on a CPU."""
        return How(device, torch.bfloat16 if device.type == "cuda" else torch.float32, seconds, rounds)

    def time(self, calls: dict[str, Call]) -> Rounds:
        return interleaved(calls, self.device, seconds=self.seconds, rounds=self.rounds)


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
