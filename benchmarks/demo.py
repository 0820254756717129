"""What the demo gives: seconds of the whole command, and time, density and fidelity of every method in it.

``python benchmarks/demo.py [--out benchmarks/results/demo.json] [--fast] [key=value ...]``

Notable choices: the command runs as a user runs it, in a process of its own and into a fresh folder, so "whole" counts loading,
metrics and the report too. A method's time is that of the demo's timed rounds of one sample, all methods step by step in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from foveal.pipelines.bench.rounds import Rounds, Timing
from foveal.pipelines.bench.rows import SHORT, row, write

WHOLE = "whole"


def run(folder: Path, options: list[str]) -> float:
    """The command into a folder -> its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "foveal", "demo", *options, f"output={folder}"]
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def rows_of(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Rows of a finished demo: the whole command, then every method of every study, dense first."""
    document = json.loads((folder / "result.json").read_text())
    command = Rounds({WHOLE: Timing((1e3 * seconds,))})
    rows = [row("demo", WHOLE, "foveal", command, None, key=WHOLE, shape={}, dtype="fp32", includes=[WHOLE])]
    for study in document["studies"]:
        timed = rounds(folder / study.get("folder", ""), study)
        rows += [method_row(study, method, timed) for method in study["methods"]]
    return rows


def rounds(folder: Path, study: dict[str, Any]) -> Rounds:
    """The timed rounds of a study; a method without any counts as one that cannot be timed."""
    times: dict[str, list[float]] = {}
    for method in study["methods"]:
        kept = [folder / "work" / f"round-{method['id']}-{number}.json" for number in range(study["design"]["rounds"])]
        times[method["id"]] = [1e3 * json.loads(path.read_text())["value"]["seconds"] for path in kept]
    untimed = {name: "not timed" for name, found in times.items() if not found}
    return Rounds({name: Timing(tuple(found)) for name, found in times.items() if found}, untimed)


def method_row(study: dict[str, Any], method: dict[str, Any], timed: Rounds) -> dict[str, Any]:
    """One method on one study: generating a sample end to end, and its metrics with intervals."""
    model, design, name = study["model"], study["design"], method["name"]
    known = {
        "method": None if name == "dense" else name, "setting": method["label"], "title": study["title"],
        "shape": {"tokens": model["tokens"], "heads": model["heads"], "head_dim": model["head_dim"], "batch": 1},
        "dtype": SHORT[getattr(torch, model["dtype"])], "visited": method["density"]["visited"],
        "samples": len(design["prompts"]) * len(design["seeds"]), "others_cpu": design["others_cpu"],
        "bound_at_density": method.get("speed", {}).get("speedup", {}).get("amdahl_at_density"), "bound": study["amdahl"]["bound"],
        "metrics": {m["id"]: {"value": m["value"], "ci95": m["ci95"]} for m in method["metrics"]},
        "includes": ["order", "plan", "kernel", "inverse", "model", "decoding"],
    }  # fmt: skip
    found = row(
        study["id"], "generate", method["implementation"], timed, "dense", key=method["id"],
        density=method["density"]["mean"], **known,
    )  # fmt: skip
    found.pop("failed", None)  # not timed is no failure here
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo.json"))
    parser.add_argument("--fast", action="store_true", help="only the quality study")
    parser.add_argument("overrides", nargs="*", help="key=value, as foveal demo takes them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "demo"
        seconds = run(folder, [*(["--fast"] if args.fast else []), *args.overrides])
        device = json.loads((folder / "result.json").read_text())["studies"][0]["model"]["device"]
        write(args.out, "demo", rows_of(folder, seconds), torch.device(device))


if __name__ == "__main__":
    main()
