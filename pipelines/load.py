"""How much of the processors other programs used while something was timed: the fact that decides whether a time can be quoted.

Notable choices
- Read from the kernel's own counters (Linux); elsewhere the answer is None, which says nothing.
- Time that a virtual machine was denied counts as other programs' time.
- Two threads on one free core are far slower than one: sparse attention, made of many short parallel stretches, suffers more
  than dense attention. A busy machine therefore shifts ratios, not only times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def busy_seconds() -> float | None:
    """Processor seconds that all programs have used since the machine started; None where the kernel does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) for x in fields)
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


class Others:
    """share: of all processors' time, what other programs used; None until the stretch is over, and where it is unknown."""

    share: float | None = None


@contextmanager
def others_watched() -> Iterator[Others]:
    """Watch other programs while the block runs."""
    found = Others()
    wall, own, busy = time.perf_counter(), time.process_time(), busy_seconds()
    yield found
    wall, own, after = time.perf_counter() - wall, time.process_time() - own, busy_seconds()
    if busy is not None and after is not None and wall > 0:
        found.share = round(min(1.0, max(0.0, after - busy - own) / (wall * (os.cpu_count() or 1))), 3)
