"""Block-sparse attention with lists given, beside dense attention and other sparse kernels: rows of `bench kernels`.

Letters: B batch, H heads, N tokens, D head dim; R query blocks, C key blocks.

Notable choices
- Lists are random and differ by head, the same count in every row unless a case says otherwise: the kernel alone is measured here,
  methods in ``benchmarks/static_methods.py``, whole blocks in layers.py.
- All densities of a case, and dense attention, are one interleaved measurement.
- ``against_flash4`` is flash-attn-4's dense time over the row's, ``against_flash4_sparse`` its time on the same lists; null where it
  is not installed or did not run.
- Errors are those of sampled rows against fp64, on the competitor's own output; padded rows, which leave out their mask, have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan
from foveal.pipelines.bench import competitors
from foveal.pipelines.bench.cases import Case, WindowCase
from foveal.pipelines.bench.rounds import How, Rounds, reason
from foveal.pipelines.bench.rows import SHORT, Rows, row, rows_error

EQUAL = ", equal counts"
Seen = Callable[[int, int], Any]


def draw(
    tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, batch: int = 1
) -> list[Tensor]:
    """q, k, v [B, H, N, D] as a projection leaves them: heads beside each other."""
    gen = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens, heads, head_dim)
    return [torch.randn(shape, device=device, dtype=dtype, generator=gen).transpose(1, 2) for _ in range(3)]


def random_plan(case: Case, density: float, device: torch.device, spread: float | None = None) -> BlockPlan:
    """Random lists per head; with ``spread`` the counts follow a gamma distribution of that coefficient of variation."""
    gen = torch.Generator().manual_seed(1)
    n, spread = case.tokens, case.spread if spread is None else spread
    q_start, kv_start = (torch.arange(0, n, block, dtype=torch.int32) for block in (case.q_block, case.kv_block))
    r, c = q_start.numel(), kv_start.numel()
    mean = max(1, round(density * c))
    if spread:
        shape = torch.full((1, case.heads, r), spread**-2, dtype=torch.float64)
        counts = (torch._standard_gamma(shape, generator=gen) * mean * spread**2).round().clamp(1, c).int()
    else:
        counts = torch.full((1, case.heads, r), mean, dtype=torch.int32)
    q_start, kv_start, counts = (x.to(device) for x in (q_start, kv_start, counts))
    order = torch.rand(1, case.heads, r, c, generator=gen).to(device).argsort(-1)
    kept = torch.arange(c, device=device) < counts[..., None]
    index = torch.where(kept, order, c).sort(-1).values[..., : int(counts.max())].clamp(max=c - 1).int()
    return BlockPlan(
        n_queries=n, n_keys=n, q_start=q_start, q_len=(n - q_start).clamp(max=case.q_block), kv_start=kv_start,
        kv_len=(n - kv_start).clamp(max=case.kv_block), count=counts, n_full=counts.clone(), index=index,
    )  # fmt: skip


# ---- what a row of the result attends
def everything(head: int, at: int) -> slice:
    return slice(None)


def listed_keys(plan: BlockPlan) -> Seen:
    """Indices of the keys that a row attends, for plans of uniform blocks without orders and masks."""
    lists = plan.to("cpu")

    def seen(head: int, at: int) -> Tensor:
        r = at // plan.max_q_len
        h = head if lists.index.shape[1] > 1 else 0
        blocks = lists.index[0, h, r, : int(lists.count[0, h, r])].long()
        keys = (blocks[:, None] * plan.max_kv_len + torch.arange(plan.max_kv_len)).flatten()
        return keys[keys < plan.n_keys].to(plan.device)

    return seen


def window_keys(case: WindowCase, coord: Tensor) -> Seen:
    """Keys inside the window of a row by its definition: as wide at a border as elsewhere. coord: int [3, N] of every row."""
    length, size = torch.tensor(case.grid)[:, None], torch.tensor(case.window)[:, None]

    def seen(head: int, at: int) -> Tensor:
        low = (coord[:, at, None].cpu() - size // 2).clamp(min=0).minimum(length - size).to(coord.device)
        return ((low <= coord) & (coord < low + size.to(coord.device))).all(0)

    return seen


# ---- rows
def dense_calls(q: Tensor, k: Tensor, v: Tensor, everybody: bool, flash2: bool) -> dict[str, Any]:
    """Dense competitors; without flash2, FlashAttention-2 is left out on a GPU, where it is the slower by far."""
    calls = competitors.dense(q, k, v, everybody)
    return {n: c for n, c in calls.items() if flash2 or not q.is_cuda or not n.startswith("flash2")}


def sparse_rows(case: Case, how: How) -> Rows:
    """All competitors of one case, dense and at every density, as one interleaved measurement."""
    q, k, v = draw(case.tokens, case.heads, case.head_dim, how.device, how.dtype)
    shape = {
        "tokens": case.tokens, "heads": case.heads, "head_dim": case.head_dim, "batch": 1, "blocks": [case.q_block, case.kv_block],
    }  # fmt: skip
    dense = dense_calls(q, k, v, case.everybody, case.flash2)
    plans = {f"{case.name} @ {d:g}": random_plan(case, d, how.device) for d in case.densities}
    if case.spread:
        plans |= {f"{case.name} @ {d:g}{EQUAL}": random_plan(case, d, how.device, spread=0.0) for d in case.densities}
    calls = dict(dense)
    for title, plan in plans.items():
        calls |= {f"{n} in {title}": call for n, call in competitors.sparse(q, k, v, plan, case.flex).items()}
    timed = how.time(calls)
    errors = Errors(calls, timed, (q, k, v), [0, case.tokens // 2 + 3, case.tokens - 1])
    found = dense_rows(case.name, dense, timed, errors, shape, how.dtype)
    for title, plan in plans.items():
        names = {key: key.removesuffix(f" in {title}") for key in calls if key.endswith(f" in {title}")}
        found += plan_rows(
            title, names, timed, errors, plan, listed_keys(plan), {"shape": shape, "dtype": SHORT[how.dtype]}
        )
    return against_equal(found) if case.spread else found


class Errors:
    """Errors of competitors that were timed, one more call each; what fails only now is said in the row."""

    def __init__(self, calls: dict[str, Any], timed: Rounds, qkv: tuple[Tensor, ...], rows: list[int]) -> None:
        self.calls, self.timed, self.qkv, self.rows = calls, timed, qkv, rows

    def of(self, key: str, seen: Seen) -> dict[str, Any]:
        if key not in self.timed.timings or key.endswith(competitors.PADDED):
            return {"rel_l2": None}
        q, k, v = self.qkv
        try:
            return {"rel_l2": rows_error(self.calls[key](), q, k, v, seen, self.rows)}
        except Exception as error:
            return {"rel_l2": None, "error_unknown": reason(error)}


def baseline_of(timed: Rounds) -> str | None:
    """The fastest backend of SDPA that ran."""
    return timed.fastest([n for n in timed.timings if competitors.is_sdpa(n)])


def dense_rows(case: str, dense: dict[str, Any], timed: Rounds, errors: Errors, shape: dict[str, Any], dtype: torch.dtype) -> Rows:  # fmt: skip
    facts: dict[str, Any] = {"shape": shape, "dtype": SHORT[dtype]}
    return [
        row(case, "dense_fwd", n, timed, baseline_of(timed), **facts, **errors.of(n, everything), **against_flash4(n, timed))
        for n in dense
    ]  # fmt: skip


def plan_rows(
    case: str, names: dict[str, str], timed: Rounds, errors: Errors, plan: BlockPlan, seen: Seen, facts: dict[str, Any]
) -> Rows:  # fmt: skip
    """The rows of one plan. names: implementation by the key it was timed under."""
    same_lists = next((key for key, name in names.items() if name == "flash4-sparse"), None)
    facts = facts | {"density": plan.density, "visited": plan.visited}
    found = []
    for key, name in names.items():
        more = facts | errors.of(key, seen) | against_flash4(key, timed, same_lists)
        found.append(row(case, "block_sparse_fwd", name, timed, baseline_of(timed), key=key, **more))
    return found


def against_flash4(key: str, timed: Rounds, same_lists: str | None = None) -> dict[str, Any]:
    """flash-attn-4's time over this one's."""
    found = {
        "against_flash4": timed.timings.get("flash4"),
        "against_flash4_sparse": timed.timings.get(same_lists or ""),
    }
    own = timed.timings.get(key)
    return {name: None if own is None or theirs is None else theirs.ms / own.ms for name, theirs in found.items()}


def against_equal(rows: Rows) -> Rows:
    """``against_equal``: time per pair with equal counts over that with unequal ones, 1 where balance does not matter."""
    twins = {(r["case"], r["impl"]): r for r in rows}
    for r in rows:
        twin = twins.get((r["case"] + EQUAL, r["impl"]))
        if twin is not None and r["ms"] is not None and twin["ms"] is not None:
            r["against_equal"] = twin["ms"] / twin["density"] * r["density"] / r["ms"]
    return rows


def window_rows(case: WindowCase, how: How) -> Rows:
    """A token-exact window of stride 1: boxes on partial blocks. Tokens lie in tile order, as a host would have put them."""
    from foveal.plugins.methods.neighborhood import Neighborhood
    from foveal.plugins.order import order_of
    from foveal.plugins.site import Site, Span, State

    n = case.grid[0] * case.grid[1] * case.grid[2]
    q, k, v = draw(n, case.heads, case.head_dim, how.device, how.dtype)
    site = Site(role="self", name="bench", layer=0, layers=1, grid=case.grid, visual=Span(0, n), ordered=True)
    plan = Neighborhood(window=case.window, tile=case.tile).plan(q, k, v, site, State())
    assert plan is not None
    coord = order_of(case.grid, case.tile).coord.to(how.device).int()
    dense, sparse = dense_calls(q, k, v, False, case.flash2), competitors.sparse(q, k, v, plan, case.flex)
    calls = {**dense, **sparse}
    timed = how.time(calls)
    errors = Errors(calls, timed, (q, k, v), [0, n // 2 + 3, n - 1])
    shape = {
        "tokens": n, "heads": case.heads, "head_dim": case.head_dim, "batch": 1, "grid": list(case.grid),
        "window": list(case.window), "tile": list(case.tile),
    }  # fmt: skip
    facts = {"shape": shape, "dtype": SHORT[how.dtype]}
    found = dense_rows(case.name, dense, timed, errors, shape, how.dtype)
    return found + plan_rows(case.name, {n: n for n in sparse}, timed, errors, plan, window_keys(case, coord), facts)
