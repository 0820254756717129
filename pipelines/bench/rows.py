"""The one schema of measured files: ``benchmarks/results/<bench>.json``."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.pipelines.bench.rounds import Rounds

FIELDS = (
    "case", "op", "impl", "method", "shape", "dtype", "density", "ms", "ms_min", "ms_max", "baseline", "speedup", "eff", "rel_l2",
    "includes",
)  # fmt: skip
UNTIMED = dict.fromkeys(("ms", "ms_min", "ms_max", "speedup", "eff"))
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
Rows = list[dict[str, Any]]


def row(
    case: str, op: str, impl: str, rounds: Rounds, baseline: str | None, *, key: str | None = None, density: float = 1.0,
    **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """One competitor of one case, measured under ``key`` (default: impl). speedup: baseline ms / ms; eff: baseline ms x density / ms.

    A competitor that failed keeps its reason under ``failed``, with null figures; without a baseline there is no speed-up.
    """
    known: dict[str, Any] = {
        "case": case,
        "op": op,
        "impl": impl,
        "method": None,
        "dtype": "bf16",
        "rel_l2": None,
        "includes": ["kernel"],
    }
    known |= {"density": density, "baseline": baseline, **facts}
    key = key or impl
    if key in rounds.failed:
        return known | UNTIMED | {"failed": rounds.failed[key]}
    timing = rounds.timings[key]
    base = rounds.timings.get(baseline or "")
    speedup = base.ms / timing.ms if base else None
    return known | timing.facts() | {"speedup": speedup, "eff": None if speedup is None else speedup * density}


def rows_error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Callable[[int, int], Any], rows: list[int], scale: float | None = None
) -> float:  # fmt: skip
    """Relative L2 error of sampled query rows of the first and last head against fp64. ``seen(head, row)`` -> bool [M] or index of keys."""
    wrong = size = 0.0
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    for head in (0, q.shape[1] - 1):
        for r in rows:
            keys = seen(head, r)
            s = (k[0, head, keys].double() @ q[0, head, r].double()) * factor
            true = s.softmax(0) @ v[0, head, keys].double()
            wrong += (out[0, head, r].double() - true).square().sum().item()
            size += true.square().sum().item()
    return (wrong / size) ** 0.5 if size else 0.0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    from foveal import __version__

    found = {"torch": torch.__version__, "foveal": __version__}
    for name in ("triton", "diffusers", "timm", "flash-attn-4", "fla-core", "xformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(path: Path, bench: str, rows: Iterable[dict[str, Any]], device: torch.device) -> None:
    """Write rows with device, versions, date and command. ValueError where a row lacks a field of the schema."""
    rows = list(rows)
    missing = {name for r in rows for name in FIELDS if name not in r}
    if missing:
        raise ValueError(f"rows of {bench} lack {', '.join(sorted(missing))}.")
    record = {
        "bench": bench, "command": " ".join(["python", *_portable(sys.argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "device": device_name(device),
        "versions": versions(), "rounds": min((r["rounds"] for r in rows if r.get("rounds")), default=0), "rows": rows,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _portable(argv: list[str]) -> list[str]:
    """The command without folders of this machine."""
    script = Path(argv[0])
    if script.name == "__main__.py":
        first = ["-m", "foveal.pipelines.bench"]
    elif script.parent.name == "pipelines":
        first = ["-m", f"foveal.pipelines.{script.stem}"]
    else:
        first = [f"{script.parent.name}/{script.name}"]
    return [*first, *(Path(a).name if Path(a).is_absolute() else a for a in argv[1:])]
