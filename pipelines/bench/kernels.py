"""`bench kernels`: block-sparse attention with lists given, beside dense attention and other sparse kernels.

Letters as in competitors.py.

Notable choices
- Lists are random and differ by head, the same count in every row unless a case says otherwise: the kernel alone is measured here,
  methods in `benchmarks/static_methods.py`, whole blocks in layers.py.
- The baseline of every row is the fastest dense SDPA of this machine, padded where that is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan
from foveal.kernels.order import permute_tokens
from foveal.kernels.selection import block_lists, block_scores, keep_top_k, pool_blocks
from foveal.pipelines.bench import competitors
from foveal.pipelines.bench.rounds import host_microseconds, interleaved
from foveal.pipelines.bench.rows import row, rows_error

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """tokens, heads, head_dim of the call; blocks of queries and keys; densities; spread: coefficient of variation of the counts."""

    name: str
    tokens: int
    heads: int
    head_dim: int = 128
    q_block: int = 128
    kv_block: int = 128
    densities: tuple[float, ...] = (0.25,)
    spread: float = 0.0
    flex: bool = False


CASES = (
    Case(name="wan-1.3b aligned", tokens=32768, heads=12, densities=(0.5, 0.25, 0.125, 0.0625), flex=True),
    Case(name="hunyuan aligned", tokens=118784, heads=24, densities=(0.5, 0.25, 0.125, 0.0625)),
    Case(name="head dim 64", tokens=17792, heads=48, head_dim=64, densities=(0.25, 0.125)),
    Case(name="head dim 80", tokens=17792, heads=48, head_dim=80),
    Case(name="head dim 96", tokens=17792, heads=48, head_dim=96),
    Case(name="key blocks of 64", tokens=32768, heads=12, kv_block=64, densities=(0.25, 0.125)),
    Case(name="wan-1.3b ragged", tokens=32760, heads=12),
    Case(name="wan-14b ragged", tokens=75600, heads=40),
    Case(name="hunyuan ragged", tokens=119056, heads=24),
    Case(name="unequal counts", tokens=32768, heads=12, densities=(0.125,), spread=1.0),
)
TINY = (
    Case(name="tiny", tokens=512, heads=2, head_dim=32, densities=(0.5, 0.25)),
    Case(name="tiny ragged", tokens=500, heads=2, head_dim=32, spread=1.0),
)


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, N, D] as a projection leaves them: heads beside each other."""
    gen = torch.Generator(device).manual_seed(0)
    shape = (1, case.tokens, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, generator=gen).transpose(1, 2) for _ in range(3))
    return q, k, v


def random_plan(case: Case, density: float, device: torch.device) -> BlockPlan:
    """Random lists per head; with ``spread`` the counts follow a gamma distribution of that coefficient of variation."""
    gen = torch.Generator().manual_seed(1)
    n = case.tokens
    q_start, kv_start = (torch.arange(0, n, block, dtype=torch.int32) for block in (case.q_block, case.kv_block))
    r, c = q_start.numel(), kv_start.numel()
    mean = max(1, round(density * c))
    if case.spread:
        shape = torch.full((1, case.heads, r), case.spread**-2, dtype=torch.float64)
        counts = (torch._standard_gamma(shape, generator=gen) * mean * case.spread**2).round().clamp(1, c).int()
    else:
        counts = torch.full((1, case.heads, r), mean, dtype=torch.int32)
    order = torch.rand(1, case.heads, r, c, generator=gen).argsort(-1)
    kept = torch.arange(c) < counts[..., None]
    index = torch.where(kept, order, c).sort(-1).values[..., : int(counts.max())].clamp(max=c - 1).int()
    return BlockPlan(
        n_queries=n, n_keys=n, q_start=q_start, q_len=(n - q_start).clamp(max=case.q_block), kv_start=kv_start,
        kv_len=(n - kv_start).clamp(max=case.kv_block), count=counts, n_full=counts.clone(), index=index,
    ).to(device)  # fmt: skip


def listed_keys(plan: BlockPlan) -> Any:
    """(head, row) -> indices of the keys that row attends, for plans of uniform blocks without orders and masks."""
    lists = plan.to("cpu")

    def seen(head: int, at: int) -> Tensor:
        r = at // plan.max_q_len
        h = head if lists.index.shape[1] > 1 else 0
        blocks = lists.index[0, h, r, : int(lists.count[0, h, r])].long()
        keys = (blocks[:, None] * plan.max_kv_len + torch.arange(plan.max_kv_len)).flatten()
        return keys[keys < plan.n_keys].to(plan.device)

    return seen


def sparse_rows(case: Case, device: torch.device, seconds: float, dtype: torch.dtype = torch.bfloat16) -> Rows:
    """All competitors of one case, one interleaved measurement per density."""
    q, k, v = draw(case, device, dtype)
    found: Rows = []
    shape = {
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "batch": 1,
        "blocks": [case.q_block, case.kv_block],
    }
    for density in case.densities:
        plan = random_plan(case, density, device)
        calls: dict[str, Any] = {**competitors.dense(q, k, v)}
        dense = list(calls)
        calls |= competitors.ours(q, k, v, plan)
        if case.flex and density in (0.25, 0.125) and q.is_cuda:
            calls["flex"] = competitors.flex(q, k, v, plan)
        rounds = interleaved(calls, device, seconds=seconds)
        baseline = rounds.fastest([n for n in dense if n != "flash4"])
        rows_at = [0, case.tokens // 2 + 3, case.tokens - 1]
        for name, call in calls.items():
            sparse = name not in dense
            facts: dict[str, Any] = {
                "shape": shape,
                "dtype": str(dtype)[6:],
                "density": plan.density if sparse else 1.0,
            }
            if name in rounds.timings and sparse:
                facts["rel_l2"] = rows_error(call(), q, k, v, listed_keys(plan), rows_at)
                if "flash4" in rounds.timings:
                    facts["against_flash4"] = rounds.timings["flash4"].ms / rounds.timings[name].ms
            op = "block_sparse_fwd" if sparse else "dense_fwd"
            found.append(row(f"{case.name} @ {density:g}", op, name, rounds, baseline, **facts))
    return found


def window_rows(device: torch.device, seconds: float, grid: tuple[int, int, int] = (30, 48, 80), window: tuple[int, int, int] = (18, 24, 24),
                tile: tuple[int, int, int] = (2, 8, 8), heads: int = 24, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Rows:  # fmt: skip
    """A token-exact 3-D window of stride 1: boxes on partial blocks."""
    from foveal.plugins.methods.neighborhood import Neighborhood
    from foveal.plugins.site import Site, Span, State

    n = grid[0] * grid[1] * grid[2]
    case = Case(name="window", tokens=n, heads=heads, head_dim=head_dim)
    q, k, v = draw(case, device, dtype)
    site = Site(role="self", name="bench", layer=0, layers=1, grid=grid, visual=Span(0, n), ordered=True)
    plan = Neighborhood(window=window, tile=tile).plan(q, k, v, site, State())
    assert plan is not None
    calls = {**competitors.dense(q, k, v), **competitors.ours(q, k, v, plan)}
    rounds = interleaved(calls, device, seconds=seconds)
    baseline = rounds.fastest([n for n in calls if n in ("cudnn", "flash2", "math", "cudnn-padded")])
    shape = {
        "tokens": n,
        "heads": heads,
        "head_dim": head_dim,
        "batch": 1,
        "grid": list(grid),
        "window": list(window),
        "tile": list(tile),
    }
    return [
        row("exact window", "block_sparse_fwd" if name in ("hopper", "triton", "torch") else "dense_fwd", name, rounds, baseline, shape=shape,
            dtype=str(dtype)[6:], density=plan.density if name in ("hopper", "triton", "torch") else 1.0, visited=plan.visited)
        for name in calls
    ]  # fmt: skip


def order_rows(
    device: torch.device,
    seconds: float,
    tokens: int = 118784,
    heads: int = 24,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Rows:
    """Permuting one tensor along its tokens, beside torch's gather and a plain copy."""
    x = torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
    order = torch.randperm(tokens, device=device)
    target = torch.empty_like(x)
    calls = {
        "copy": lambda: target.copy_(x),
        "index_select": lambda: x.transpose(1, 2).index_select(1, order),
        "permute": lambda: permute_tokens(x, order),
    }
    rounds = interleaved(calls, device, seconds=seconds)
    moved = 2 * x.numel() * x.element_size()
    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "batch": 1}
    return [
        row("token order", "permute", name, rounds, "index_select", shape=shape, dtype=str(dtype)[6:],
            tb_per_s=moved / rounds.timings[name].ms / 1e9)
        for name in calls
    ]  # fmt: skip


def selection_rows(
    device: torch.device,
    seconds: float,
    tokens: int = 118784,
    heads: int = 24,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Rows:
    """Pooling q and k, scoring, keeping the best eighth and building lists, beside the attention they serve."""
    case = Case(name="selection", tokens=tokens, heads=heads, head_dim=head_dim)
    q, k, v = draw(case, device, dtype)
    plan = random_plan(case, 0.125, device)
    start, length, kept = plan.q_start[0, 0], plan.q_len[0, 0], plan.index.shape[-1]

    def select() -> Any:
        queries, keys = (pool_blocks(x, start, length, max_length=128) for x in (q, k))
        return block_lists(keep_top_k(block_scores(queries, keys, head_dim**-0.5), kept), width=kept)

    calls: dict[str, Any] = {"select": select, **competitors.ours(q, k, v, plan)}
    rounds = interleaved(calls, device, seconds=seconds)
    best = rounds.fastest([n for n in calls if n != "select"])
    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "batch": 1}
    facts: dict[str, Any] = {"shape": shape, "dtype": str(dtype)[6:], "density": plan.density}
    share = rounds.timings["select"].ms / rounds.timings[best].ms
    return [
        row("selection @ 0.125", "selection" if n == "select" else "block_sparse_fwd", n, rounds, best, **facts)
        | ({"share_of_attention": share} if n == "select" else {})
        for n in calls
    ]


def host_rows(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Rows:
    """Host time of one small call."""
    case = Case(name="host", tokens=2048, heads=2)
    q, k, v = draw(case, device, dtype)
    plan = random_plan(case, 0.25, device)
    calls = {**competitors.dense(q, k, v), **competitors.ours(q, k, v, plan)}
    rounds = interleaved(calls, device, seconds=0.2)
    shape = {"tokens": 2048, "heads": 2, "head_dim": 128, "batch": 1}
    dense = [n for n in calls if n in competitors.BACKENDS]
    return [
        row("host time", "dense_fwd" if n in dense else "block_sparse_fwd", n, rounds, rounds.fastest(dense), shape=shape, dtype=str(dtype)[6:],
            density=1.0 if n in dense else plan.density, host_us=host_microseconds(call, device))
        for n, call in calls.items() if n in rounds.timings
    ]  # fmt: skip


def measure(device: torch.device, seconds: float, tiny: bool = False) -> Iterator[Rows]:
    """The rows of every case, case by case. seconds: of measuring per case and density."""
    if tiny:
        small: dict[str, Any] = {"heads": 2, "head_dim": 32, "dtype": torch.float32}
        for case in TINY:
            yield sparse_rows(case, device, seconds, torch.float32)
        yield window_rows(device, seconds, (4, 8, 8), (2, 4, 4), (2, 4, 4), **small)
        yield order_rows(device, seconds, 256, **small)
        yield selection_rows(device, seconds, 512, **small)
        return
    yield host_rows(device)
    yield order_rows(device, seconds)
    for case in CASES:
        yield sparse_rows(case, device, seconds)
        torch.cuda.empty_cache()
    yield window_rows(device, seconds)
    yield selection_rows(device, seconds)


def line(r: dict[str, Any]) -> str:
    """One row as a line of text."""
    if r.get("failed"):
        return f"{r['case']:28} {r['impl']:12} failed: {r['failed']}"
    extra = "".join(
        f"  {label} {r[name]:.3g}"
        for name, label in (
            ("rel_l2", "err"),
            ("tb_per_s", "TB/s"),
            ("host_us", "host us"),
            ("share_of_attention", "share"),
            ("against_flash4", "x flash4"),
        )
        if r.get(name) is not None
    )
    return f"{r['case']:28} {r['impl']:12} density {r['density']:.3f}  {r['ms']:9.3f} ms  x{r['speedup']:.2f}  eff {r['eff']:.3f}{extra}"
