"""``python -m foveal.pipelines.bench kernels|layers|backbones|vision``: the same as ``foveal bench``, without its packages.

kernels needs torch and triton, layers also diffusers, backbones and vision also timm.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from foveal.pipelines.bench.rows import write

BENCHES = ("kernels", "layers", "backbones", "vision")  # modules beside this one, each with measure() and line()


def run(
    what: str,
    *,
    out: Path | None = None,
    device: str | None = None,
    seconds: float = 2.0,
    tiny: bool = False,
    cases: list[str] | None = None,
    rounds: int | None = None,
) -> Path:
    """Measure, print a line per row, write the file. ``rounds`` fixes what ``seconds`` chooses. -> its path"""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cpu" and not tiny:
        raise ValueError(f"bench {what} at full size needs a GPU; give --tiny to try it on a CPU.")
    torch.manual_seed(0)
    path = out or Path(f"benchmarks/results/{what}.json")
    rows: list[dict[str, Any]] = []
    for found in _cases(what, place, seconds, tiny, cases, rounds):
        rows += found
        write(path, what, rows, place)  # after every case: a run that is cut off leaves what it has
    return path


def _cases(
    what: str, device: torch.device, seconds: float, tiny: bool, cases: list[str] | None, rounds: int | None
) -> Iterator[list[dict[str, Any]]]:
    bench = importlib.import_module(
        f"foveal.pipelines.bench.{what}"
    )  # only this one: the others may need more packages
    for found in bench.measure(device, seconds, tiny, cases, rounds):
        for r in found:
            print(bench.line(r), flush=True)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(prog="foveal.pipelines.bench", description=__doc__)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/WHAT.json")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per case")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for trying the harness on a CPU")
    parser.add_argument("--rounds", type=int, help="exactly so many, instead of --seconds")
    parser.add_argument(
        "--cases", nargs="+", help="names of cases or, but for layers, of groups of them; a wrong name lists them"
    )
    args = vars(parser.parse_args())
    print(run(args.pop("what"), **args))


if __name__ == "__main__":
    main()
