"""Time that nobody waits for: host seconds on a CPU, event pairs on a GPU, read when somebody asks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

Mark = Any  # perf_counter seconds, or a CUDA event and its device, or None where time is not taken
Lap = Any  # seconds, or a pair of CUDA events, or None
MANY = 64  # waiting event pairs, after which the finished ones are read


def start_clock(device: torch.device) -> Mark:
    """A mark in time, without waiting for the device. None inside a CUDA graph capture."""
    if device.type != "cuda":
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event, device


def stop_clock(mark: Mark) -> Lap:
    """The lap since a mark: seconds, or an event pair that is read later."""
    if mark is None or isinstance(mark, float):
        return None if mark is None else time.perf_counter() - mark
    event, device = mark
    now = start_clock(device)
    return None if now is None else (event, now[0])


@dataclass
class Laps:
    """A sum of laps. Event pairs wait in ``pending`` until they are read, or until there are many of them."""

    total: float = 0.0
    pending: list[Lap] = field(default_factory=list)

    def add(self, lap: Lap) -> None:
        if isinstance(lap, float):
            self.total += lap
        elif lap is not None:
            self.pending.append(lap)
            if len(self.pending) >= MANY:
                self._settle([pair for pair in self.pending if pair[1].query()])

    def seconds(self) -> float:
        if self.pending:
            self.pending[-1][1].synchronize()
            self._settle(list(self.pending))
        return self.total

    def _settle(self, pairs: list[Lap]) -> None:
        for first, last in pairs:
            last.synchronize()
            self.total += first.elapsed_time(last) / 1000
        done = {id(pair) for pair in pairs}
        self.pending = [pair for pair in self.pending if id(pair) not in done]
