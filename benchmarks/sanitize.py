"""Fifty small calls of every kernel under compute-sanitizer: reads and writes out of bounds, and races in shared memory.

``python benchmarks/sanitize.py [--tools memcheck racecheck] [--out benchmarks/results/sanitizer.json]`` starts itself under each tool and
writes what they found; ``python benchmarks/sanitize.py --cases [GROUP ...]`` only runs the calls. On an NVIDIA GPU, from the repository.

Notable choices
- Shapes are small and random (``tests/plan_fuzz.py``), and few things that a compiler specialises on: a tool slows launches, not compiling.
- The calls run once without a tool first, so that under it everything is compiled already.
- PyTorch's caching allocator is off: each tensor is an allocation of its own, so that reading past its end is seen.
- racecheck runs the Hopper kernel apart from the others. It sees shared memory that threads read and write; what the copy engine and the
  tensor cores do there, ordered by mbarriers, it does not attribute to any thread: for those it says nothing either way.
- It also names, once a call, the byte through which Triton tells warps their role (``gl.warp_specialize``): writes and reads of it are
  ordered by a named barrier that the tool does not follow. Such a report lies on the kernel's first line and on that call; it is counted
  apart, as ``roles``, and anything on another line is an error.
- The exit status is 0 only if all calls ran, gave finite numbers, and no tool named an error.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # where the package need not be installed

from plan_fuzz import Recipe, make_case  # noqa: E402

from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention  # noqa: E402
from foveal.kernels.gated_linear import (  # noqa: E402
    bidirectional_gated_linear_attention,
    gated_linear_attention,
    linear_attention,
)
from foveal.kernels.order import permute_tokens  # noqa: E402
from foveal.kernels.selection import block_lists, pool_blocks  # noqa: E402
from foveal.pipelines.bench.rows import device_name, versions  # noqa: E402

Call = Callable[[], Any]
EVERYTHING = {"box", "bits", "block_bias", "key_bias", "dense", "init", "lse", "order", "heads"}
HOPPER: tuple[tuple[torch.dtype, int, set[str]], ...] = (
    (torch.bfloat16, 128, {"even", "wide", "dense", "grouped"}),
    (torch.bfloat16, 128, {"lse", "dense", "order"}),
    (torch.float16, 64, {"heads", "lse"}),
    (torch.bfloat16, 128, {"box", "lse", "order"}),
    (torch.bfloat16, 64, {"bits", "heads"}),
    (torch.bfloat16, 128, {"init", "lse"}),
    (torch.bfloat16, 72, EVERYTHING),
    (torch.bfloat16, 128, {"even", "wide", "proxies"}),
    (torch.bfloat16, 64, {"proxies", "variance", "lse"}),
    (torch.bfloat16, 72, EVERYTHING),
)
TRITON: tuple[tuple[torch.dtype, int, set[str]], ...] = (
    (torch.bfloat16, 128, {"even", "dense", "grouped"}),
    (torch.float16, 64, {"lse", "order", "heads"}),
    (torch.float32, 32, {"box", "bits", "lse"}),
    (torch.bfloat16, 128, {"proxies", "block_bias"}),
    (torch.bfloat16, 80, EVERYTHING | {"proxies", "variance"}),
)
PER_RECIPE = 3
WITHOUT_HOPPER = ("triton", "selection", "linear")
PASSES = {"memcheck": (("hopper", *WITHOUT_HOPPER),), "racecheck": (("hopper",), WITHOUT_HOPPER)}


# ---- the calls
def attention(implementation: str, recipe: Recipe) -> Iterator[tuple[str, Call]]:
    """Calls of one recipe with positive scales, which every implementation takes."""
    seed = found = 0
    while found < PER_RECIPE:
        seed += 1
        case = make_case(recipe, seed, "cuda", longest=300)
        if case.scale <= 0:
            continue
        found += 1
        options = KernelOptions(implementation=implementation)

        def call(case: Any = case, options: KernelOptions = options) -> Any:
            return block_sparse_attention(
                case.q, case.k, case.v, case.plan, scale=case.scale, init=case.init, return_lse=True, options=options
            )

        yield f"{implementation} {recipe.id} {seed}", call


def selection() -> Iterator[tuple[str, Call]]:
    torch.manual_seed(0)
    length = torch.tensor([128, 0, 7, 165], device="cuda", dtype=torch.int32)
    start = length.cumsum(0, dtype=torch.int32) - length
    x = torch.randn(2, 300, 3, 72, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    order = torch.rand(2, 3, 300, device="cuda").argsort(-1).masked_fill(torch.rand(2, 3, 300, device="cuda") < 0.1, -1)
    keep = torch.rand(2, 3, 5, 1500, device="cuda") < 0.3
    yield "pool", lambda: pool_blocks(x, start, length, max_length=165)
    yield (
        "pool, all statistics, an order per head",
        lambda: pool_blocks(x, start, length, order, max_length=165, variance=True, likeness=True),
    )
    yield "lists", lambda: vars(block_lists(keep)).values()
    yield "lists, cut", lambda: vars(block_lists(keep, width=100)).values()
    yield "one order", lambda: permute_tokens(x, order[0, 0])
    yield "an order per head", lambda: permute_tokens(x, order)


def linear() -> Iterator[tuple[str, Call]]:
    """Forward and backward."""
    torch.manual_seed(0)
    for n in (49, 300):
        q, k, v = (torch.randn(2, n, 3, w, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for w in (32, 32, 64))
        for kind, shape in (("vector", (2, 3, n, 32)), ("scalar", (2, 3, n))):
            gates = [F.logsigmoid(torch.randn(shape, device="cuda")) / 4 for _ in range(2)]
            yield f"{kind} gates, {n} tokens", both_ways(bidirectional_gated_linear_attention, [q, k, v, *gates])
        yield f"no gate, {n} tokens", both_ways(linear_attention, [q, k, v])
        state = torch.randn(2, 3, 32, 64, device="cuda")
        yield f"from a state, {n} tokens", both_ways(from_state, [q, k, v, gates[0], state])


def from_state(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> Tensor:
    return gated_linear_attention(q, k, v, gate, initial_state=state, reverse=True)


def both_ways(operator: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    leaves = [x.detach().requires_grad_() for x in inputs]

    def call() -> list[Tensor]:
        out = operator(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    return call


def calls(groups: tuple[str, ...]) -> Iterator[tuple[str, Call]]:
    for group, table in (("hopper", HOPPER), ("triton", TRITON)):
        for dtype, dim, features in table if group in groups else ():
            yield from attention(group, Recipe(dtype, dim, frozenset(features)))
    if "selection" in groups:
        yield from selection()
    if "linear" in groups:
        yield from linear()


def run(groups: tuple[str, ...]) -> dict[str, Any]:
    """Run the calls. -> how many, and what went wrong"""
    found: dict[str, Any] = {"groups": list(groups), "cases": 0, "failed": []}
    for name, call in calls(groups):
        found["cases"] += 1
        try:
            outs = [x for x in call() if isinstance(x, Tensor)]
            torch.cuda.synchronize()
            if any(x.isnan().any() for x in outs if x.is_floating_point()):
                found["failed"].append(f"{name}: NaN")
        except Exception as error:
            found["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    return found


# ---- the tools
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) errors?"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: .*\((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)"),
}


def sanitizer() -> str:
    """The tool's path. Raises SystemExit where it is not installed."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    path = shutil.which("compute-sanitizer") or next(
        (str(p) for x in places if x and (p := Path(x) / "bin/compute-sanitizer").is_file()), None
    )
    if path is None:
        raise SystemExit(
            "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit (or run with --cases alone)."
        )
    return path


def judged(tool: str, text: str) -> dict[str, int | None]:
    """Errors and warnings that a tool's summary names; None where it gave none."""
    match = SUMMARY[tool].search(text)
    found = match.groupdict() if match else {}
    return {name: int(found[name]) if name in found else None for name in ("errors", "warnings")}


def role_reports(text: str) -> int:
    """Of racecheck's reports, how many only concern the byte through which Triton's warp specialisation tells warps their role."""
    from foveal.kernels.block_sparse import hopper

    lines = Path(hopper.__file__).read_text().splitlines()
    places = {
        i for i, x in enumerate(lines, 1) if x.startswith("def block_sparse_hopper(") or "gl.warp_specialize(" in x
    }
    reports = re.findall(r"Race reported between [^\n]*(?:\n=+ +and [^\n]*)*", text)
    seen = [re.findall(r"(\w+\.py):(\d+)", x) for x in reports]
    return sum(bool(x) and all(f == "hopper.py" and int(n) in places for f, n in x) for x in seen)


def under(tool: str, path: str, groups: tuple[str, ...]) -> dict[str, Any]:
    """Run groups under one tool. -> a row"""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = time.perf_counter()
    command = [path, "--tool", tool, "--print-limit", "200", sys.executable, __file__, "--cases", *groups]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    text = done.stdout + done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    ran = json.loads(lines[-1]) if lines else {"cases": 0, "failed": [text[-500:]]}
    row = {"tool": tool, "groups": list(groups), "cases": ran["cases"], "failed": ran["failed"], **judged(tool, text)}
    if tool == "racecheck" and row["errors"]:
        row["roles"] = role_reports(text)
        row["errors"] -= row["roles"]
    if row["errors"]:
        print(text[-6000:], file=sys.stderr)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def write(path: Path, tool: str, rows: list[dict[str, Any]]) -> None:
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    number = re.search(r"[Vv]ersion (\S+)", version)
    record = {
        "bench": "sanitizer", "command": "python benchmarks/sanitize.py",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "device": device_name(torch.device("cuda")),
        "versions": versions() | {"compute-sanitizer": number.group(1) if number else "unknown"}, "rows": rows,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tools", nargs="+", choices=tuple(PASSES), default=list(PASSES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sanitizer.json")
    parser.add_argument("--cases", nargs="*", choices=("hopper", *WITHOUT_HOPPER), help="run these calls, no tool")
    args = parser.parse_args()
    if args.cases is not None:
        found = run(tuple(args.cases) or ("hopper", *WITHOUT_HOPPER))
        print(json.dumps(found), flush=True)
        return int(bool(found["failed"]))
    tool, rows = sanitizer(), []
    subprocess.run([sys.executable, __file__, "--cases"], check=True)  # compiles everything
    for name in args.tools:
        for groups in PASSES[name]:
            rows.append(under(name, tool, groups))
            print(json.dumps(rows[-1]), flush=True)
            write(args.out, tool, rows)
    return int(any(r["failed"] or r["errors"] != 0 for r in rows))


if __name__ == "__main__":
    sys.exit(main())
