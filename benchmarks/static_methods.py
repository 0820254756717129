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
import torch.nn.functional as F
from harness import interleaved, rows_error, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.kernels.block_sparse import BlockPlan
from foveal.kernels.block_sparse.portable_call import triton_attention
from foveal.kernels.block_sparse.tiles import Tile
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
    Case("hunyuan-720p", (33, 45, 80), 256, False, 24, (11, 5, 8)),
)
DENSITIES = (0.25, 0.125)


def dense_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    n = q.shape[2]
    calls: dict[str, Any] = {
        "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v),
        "flash2": _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v),
    }
    if n % 128:
        padded = [F.pad(x, (0, 0, 0, -n % 128)) for x in (q, k, v)]  # a lower bound: the mask it would need is left out
        calls["cudnn-padded"] = _sdpa(SDPBackend.CUDNN_ATTENTION, *padded)
    return calls


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Any:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def methods(case: Case, density: float) -> dict[str, Method]:
    return {
        "grat": GRAT(group=case.tile, pattern="auto", density=density),
        "neighborhood": Neighborhood(density=density, tile=case.tile),
    }


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    site, ordered = case.site(False), case.site(True)
    q, k, v = (
        torch.randn(1, site.tokens, case.heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    calls, facts = dense_calls(q, k, v), {}
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
    times = interleaved(calls, seconds)
    baseline = min((n for n in times if "@" not in n), key=lambda n: times[n]["ms"])
    rows = [_row(case, n, None, 1.0, 1.0, t, times[baseline]["ms"], baseline) for n, t in times.items() if "@" not in n]
    for key, (name, plan, built) in facts.items():
        out = calls[f"{key} operator"]()
        error = rows_error(out, q, k, v, _seen(plan), [0, 7, q.shape[2] // 2, q.shape[2] - 1])
        for kind in ("operator", "ordered"):
            row = _row(
                case,
                "triton",
                name,
                plan.density,
                plan.visited,
                times[f"{key} {kind}"],
                times[baseline]["ms"],
                baseline,
            )
            row |= {"setting": plan.label, "rel_l2": error, "plan_build_s": round(built, 4)}
            row["includes"] = ["order", "plan", "kernel", "inverse"] if kind == "operator" else ["plan", "kernel"]
            if kind == "operator":
                row["order_share"] = 1 - times[f"{key} ordered"]["ms"] / row["ms"]
            rows.append(row)
            print(
                f"{case.name:14} {key:20} {kind:9} density {row['density']:.3f} {row['ms']:8.3f} ms  x{row['speedup']:.2f}  eff {row['eff']:.3f}  err {error:.1e}  {plan.label}",
                flush=True,
            )
    return rows


def _attend(method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Any:
    return lambda: method.attend(q, k, v, site, State())


def _seen(plan: BlockPlan) -> Any:
    """Keys a row attends, from the plan's lists. All plans here hold full entries only."""
    plan = plan.to("cpu")
    order = plan.kv_order if plan.kv_order is not None else torch.arange(plan.n_keys)
    position = {int(t): p for p, t in enumerate(plan.q_order.tolist())} if plan.q_order is not None else {}
    starts, lengths, visits = plan.q_start[0, 0], plan.q_len[0, 0], plan.visits()[0, 0]

    def seen(row: int) -> Tensor:
        p = position.get(row, row)
        r = int(((starts <= p) & (p < starts + lengths)).nonzero()[0])
        mask = torch.zeros(plan.n_keys, dtype=torch.bool)
        for c in visits[r].nonzero()[:, 0].tolist():
            s = int(plan.kv_start[0, 0, c])
            mask[order[s : s + int(plan.kv_len[0, 0, c])].long()] = True
        return mask.cuda()

    return seen


def _row(
    case: Case,
    impl: str,
    method: str | None,
    density: float,
    visited: float,
    t: dict[str, float],
    base: float,
    baseline: str,
) -> dict[str, Any]:
    shape = {
        "tokens": case.site(False).tokens,
        "heads": case.heads,
        "head_dim": 128,
        "batch": 1,
        "grid": list(case.grid),
    }
    row = {
        "case": case.name,
        "op": "block_sparse_fwd" if method else "dense_fwd",
        "impl": impl,
        "method": method,
        "shape": shape,
        "dtype": "bf16",
    }
    row |= {
        "density": density,
        "visited": visited,
        **t,
        "baseline": baseline,
        "speedup": base / t["ms"],
        "eff": base * density / t["ms"],
    }
    return row


def tune(case: Case) -> None:
    """Time tile sizes of the portable kernel on one ordered plan of this case."""
    site = case.site(True)
    q, k, v = (
        torch.randn(1, site.tokens, case.heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    plan = methods(case, 0.25)["grat"].plan(q, k, v, site, State())
    shapes = ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 32, 4, 4))
    tiles = [Tile(*shape) for shape in shapes]
    calls = {str(t): (lambda t=t: triton_attention(q, k, v, plan, 128**-0.5, False, tile=t)) for t in tiles}
    for name, t in sorted(
        interleaved(calls | {"cudnn": dense_calls(q, k, v)["cudnn"]}, 2.0).items(), key=lambda x: x[1]["ms"]
    ):
        print(f"{case.name:14} {name:50} {t['ms']:8.3f} ms", flush=True)


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
    write(args.out, "kernels", rows, int(min(r["rounds"] for r in rows)))


if __name__ == "__main__":
    main()
