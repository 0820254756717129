"""Interleaved timing on a GPU, and the one schema of ``benchmarks/results``.

Every round calls each competitor once, so that drift of clocks and power meets all alike; the figure is the median over rounds.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


def interleaved(
    calls: dict[str, Call], seconds: float = 2.0, least: int = 5, most: int = 40
) -> dict[str, dict[str, float]]:
    """Times of each call in ms: median, min, max over rounds. About ``seconds`` of measuring after two warm-up calls each."""
    once = {name: _once(call) for name, call in calls.items() if _warm(call) is None}
    rounds = int(min(most, max(least, seconds * 1e3 / max(1e-3, sum(once.values())))))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    times = {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}
    return {
        n: {"ms": statistics.median(t), "ms_min": min(t), "ms_max": max(t), "rounds": rounds} for n, t in times.items()
    }


def _warm(call: Call) -> None:
    call()
    call()
    torch.cuda.synchronize()


def _once(call: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def rows_error(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Callable[[int], torch.Tensor],
    rows: list[int],
) -> float:
    """Relative L2 error of sampled query rows against fp64. ``seen(row)`` -> bool [M] keys that row attends."""
    wrong = size = 0.0
    for head in (0, q.shape[1] - 1):
        for row in rows:
            mask = seen(row)
            s = (k[0, head, mask].double() @ q[0, head, row].double()) * q.shape[-1] ** -0.5
            true = s.softmax(0) @ v[0, head, mask].double()
            wrong += (out[0, head, row].double() - true).square().sum().item()
            size += true.square().sum().item()
    return (wrong / size) ** 0.5


def write(path: Path, bench: str, rows: list[dict[str, Any]], rounds: int) -> None:
    """Write rows in the project's schema, with device, versions, date and the command."""
    import triton

    from foveal import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record = {
        "bench": bench, "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "foveal": __version__}, "rounds": rounds, "rows": rows,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
