"""GRAT and aligned neighbourhood attention at the shapes of Flux, Wan and HunyuanVideo, against the fastest dense SDPA.

``python benchmarks/static_methods.py [--out benchmarks/results/static_methods.json] [--tune]``

Counted in ``operator`` rows: plan lookup, token order of q, k and v, kernel, and the inverse order of the output. ``ordered``
rows are the same call where the host has put the tokens in order once per model call. Dense is the fastest of cuDNN, flash and
cuDNN on a length padded to a multiple of 128.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, choose
from foveal.kernels.block_sparse.portable_call import triton_attention
from foveal.kernels.block_sparse.tiles import Tile
from foveal.pipelines.bench import competitors
from foveal.pipelines.bench.rounds import interleaved
from foveal.pipelines.bench.rows import row, rows_error, write
from foveal.plugins.method import Method
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import Grid, Site, Span, State


@dataclass(frozen=True)
class Case:
    """One model's attention call. Grid and text in tokens; ``tile`` is the group of GRAT and the tile of the windows."""

    name: str
    grid: Grid
    text: int
    text_first: bool
    heads: int
    tile: tuple[int, int, int]

    def site(self, ordered: bool) -> Site:
        n = self.grid[0] * self.grid[1] * self.grid[2]
        start = self.text if self.text_first else 0
        text = Span(0, self.text) if self.text_first else Span(n, n + self.text)
        role = "joint" if self.text else "self"
        return Site(
            role=role,
            name="bench",
            layer=0,
            layers=1,
            grid=self.grid,
            visual=Span(start, start + n),
            text=text if self.text else None,
            ordered=ordered,
        )


CASES = (
    Case("flux-4096", (1, 256, 256), 512, True, 24, (1, 16, 16)),
    Case("wan-1.3b-480p", (21, 30, 52), 0, False, 12, (21, 3, 4)),
    Case("hunyuan-720p", (33, 45, 80), 256, False, 24, (11, 9, 5)),
)
DENSITIES = (0.25, 0.125)
CUDA = torch.device("cuda")
INCLUDES = {"operator": ["order", "plan", "kernel", "inverse"], "ordered": ["plan", "kernel"]}


def methods(case: Case, density: float) -> dict[str, Method]:
    return {
        "grat": GRAT(group=case.tile, pattern="auto", density=density),
        "neighborhood": Neighborhood(density=density, tile=case.tile),
    }


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Dense and every method at every density, one interleaved measurement."""
    site, ordered = case.site(False), case.site(True)
    q, k, v = draw(site.tokens, case.heads)
    calls: dict[str, Any] = competitors.dense(q, k, v)
    dense, facts = list(calls), {}
    for density in DENSITIES:
        for name, method in methods(case, density).items():
            key = f"{name}@{density}"
            started = time.perf_counter()
            plan = method.plan(q, k, v, site, State())
            torch.cuda.synchronize()
            assert plan is not None
            facts[key] = (name, plan, time.perf_counter() - started)
            calls[f"{key} operator"] = _attend(method, q, k, v, site)
            calls[f"{key} ordered"] = _attend(method, q, k, v, ordered)
    rounds = interleaved(calls, CUDA, seconds=seconds)
    baseline = rounds.fastest([n for n in dense if n != "flash4"])
    shape = {"tokens": site.tokens, "heads": case.heads, "head_dim": 128, "batch": 1, "grid": list(case.grid)}
    rows = [row(case.name, "dense_fwd", n, rounds, baseline, shape=shape, visited=1.0) for n in dense]
    for key, (name, plan, built) in facts.items():
        known = {
            "method": name,
            "density": plan.density,
            "visited": plan.visited,
            "shape": shape,
            "setting": plan.label,
        }
        known |= {"plan_build_s": round(built, 4)}
        if f"{key} operator" in rounds.timings:
            at = [0, 7, site.tokens // 2, site.tokens - 1]
            known["rel_l2"] = rows_error(calls[f"{key} operator"](), q, k, v, _seen(plan), at)
        impl = choose(q, plan, k=k, v=v).name
        operator, kept = (
            row(case.name, "block_sparse_fwd", impl, rounds, baseline, key=f"{key} {kind}", includes=includes, **known)
            for kind, includes in INCLUDES.items()
        )
        if operator["ms"] and kept["ms"]:
            operator["order_share"] = 1 - kept["ms"] / operator["ms"]
        rows += [operator, kept]
        for kind, r in zip(INCLUDES, (operator, kept), strict=True):
            print(line(key, kind, r), flush=True)
    return rows


def draw(tokens: int, heads: int) -> list[Tensor]:
    """q, k, v [1, H, N, 128] as a projection leaves them: heads beside each other."""
    return [torch.randn(1, tokens, heads, 128, device=CUDA, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


def line(key: str, kind: str, r: dict[str, Any]) -> str:
    if r.get("failed"):
        return f"{r['case']:14} {key:20} {kind:9} failed: {r['failed']}"
    return (
        f"{r['case']:14} {key:20} {kind:9} {r['impl']:8} density {r['density']:.3f} {r['ms']:8.3f} ms  x{r['speedup']:.2f}  "
        f"eff {r['eff']:.3f}  err {r['rel_l2']:.1e}  {r['setting']}"
    )


def _attend(method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Any:
    return lambda: method.attend(q, k, v, site, State())


def _seen(plan: BlockPlan) -> Any:
    """Keys a row attends, from the plan's lists. All plans here hold full entries only."""
    plan = plan.to("cpu")
    order = plan.kv_order if plan.kv_order is not None else torch.arange(plan.n_keys)
    position = {int(t): p for p, t in enumerate(plan.q_order.tolist())} if plan.q_order is not None else {}
    starts, lengths, visits = plan.q_start[0, 0], plan.q_len[0, 0], plan.visits()[0, 0]

    def seen(head: int, row: int) -> Tensor:
        p = position.get(row, row)
        r = int(((starts <= p) & (p < starts + lengths)).nonzero()[0])
        mask = torch.zeros(plan.n_keys, dtype=torch.bool)
        for c in visits[r].nonzero()[:, 0].tolist():
            s = int(plan.kv_start[0, 0, c])
            mask[order[s : s + int(plan.kv_len[0, 0, c])].long()] = True
        return mask.cuda()

    return seen


def tune(case: Case) -> None:
    """Time tile sizes of the portable kernel on one ordered plan of this case."""
    site = case.site(True)
    q, k, v = draw(site.tokens, case.heads)
    plan = methods(case, 0.25)["grat"].plan(q, k, v, site, State())
    shapes = ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 32, 4, 4))
    tiles = [Tile(*shape) for shape in shapes]
    calls = {str(t): (lambda t=t: triton_attention(q, k, v, plan, 128**-0.5, False, tile=t)) for t in tiles}
    rounds = interleaved(calls | {"cudnn": competitors.dense(q, k, v)["cudnn"]}, CUDA)
    for name, timing in sorted(rounds.timings.items(), key=lambda item: item[1].ms):
        print(f"{case.name:14} {name:50} {timing.ms:8.3f} ms", flush=True)
    for name, reason in rounds.failed.items():
        print(f"{case.name:14} {name:50} failed: {reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/static_methods.json"))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.tune:
        for case in CASES:
            tune(case)
        return
    rows = [row for case in CASES for row in measure(case, args.seconds)]
    write(args.out, "static_methods", rows, CUDA)


if __name__ == "__main__":
    main()
