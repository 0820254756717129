"""What surrounds an attention kernel: token order, selection of blocks, the host's time of a call. Rows of `bench kernels`.

Letters: H heads, N tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from foveal.kernels.order import permute_tokens
from foveal.kernels.selection import block_scores, pool_blocks, top_k_lists
from foveal.pipelines.bench import competitors
from foveal.pipelines.bench.cases import AroundCase, Case
from foveal.pipelines.bench.rounds import How, host_microseconds
from foveal.pipelines.bench.rows import SHORT, Rows, row
from foveal.pipelines.bench.sparse import baseline_of, draw, random_plan

KEPT = 0.125  # of the blocks


def shape_of(case: AroundCase) -> dict[str, Any]:
    return {"tokens": case.tokens, "heads": case.heads, "head_dim": case.head_dim, "batch": 1}


def order_rows(case: AroundCase, how: How) -> Rows:
    """Permuting one tensor along its tokens, beside torch's gather and a plain copy. ``tb_per_s``: bytes read and written."""
    x = torch.randn(1, case.tokens, case.heads, case.head_dim, device=how.device, dtype=how.dtype).transpose(1, 2)
    order = torch.randperm(case.tokens, device=how.device)
    target = torch.empty_like(x)
    calls = {
        "copy": lambda: target.copy_(x),
        "index_select": lambda: x.transpose(1, 2).index_select(1, order),
        "permute": lambda: permute_tokens(x, order),
    }
    timed = how.time(calls)
    moved = 2 * x.numel() * x.element_size()
    found = []
    for name in calls:
        speed: dict[str, Any] = {"tb_per_s": moved / timed.timings[name].ms / 1e9} if name in timed.timings else {}
        found.append(
            row(
                "token order",
                "permute",
                name,
                timed,
                "index_select",
                shape=shape_of(case),
                dtype=SHORT[how.dtype],
                **speed,
            )
        )
    return found  # fmt: skip


def selection_rows(case: AroundCase, how: How) -> Rows:
    """Pooling q and k, scoring, keeping the best eighth and building lists, beside the attention they serve."""
    lists = Case(name="selection", tokens=case.tokens, heads=case.heads, head_dim=case.head_dim)
    q, k, v = draw(case.tokens, case.heads, case.head_dim, how.device, how.dtype)
    plan = random_plan(lists, KEPT, how.device)
    start, length, kept = plan.q_start[0, 0], plan.q_len[0, 0], plan.index.shape[-1]

    def select() -> Any:
        queries, keys = (pool_blocks(x, start, length, max_length=128) for x in (q, k))
        return top_k_lists(block_scores(queries, keys, case.head_dim**-0.5), kept)

    attention = competitors.ours(q, k, v, plan)
    calls: dict[str, Any] = {"select": select, **attention}
    timed = how.time(calls)
    best = timed.fastest(attention)
    known = best is not None and "select" in timed.timings
    share: dict[str, Any] = (
        {"share_of_attention": timed.timings["select"].ms / timed.timings[best].ms} if known and best else {}
    )
    facts: dict[str, Any] = {"shape": shape_of(case), "dtype": SHORT[how.dtype], "density": plan.density}
    return [
        row(f"selection @ {KEPT:g}", "selection" if n == "select" else "block_sparse_fwd", n, timed, best, **facts,
            **(share if n == "select" else {}))
        for n in calls
    ]  # fmt: skip


def host_rows(small: AroundCase, how: How) -> Rows:
    """Host time of one small call, ``host_us``: what a caller waits before the next line of Python."""
    q, k, v = draw(small.tokens, small.heads, small.head_dim, how.device, how.dtype)
    plan = random_plan(
        Case(name="host", tokens=small.tokens, heads=small.heads, head_dim=small.head_dim), 0.25, how.device
    )
    calls = {**competitors.dense(q, k, v), **competitors.ours(q, k, v, plan)}
    timed = how.time(calls)
    found = []
    for name, call in calls.items():
        dense = name not in competitors.IMPLEMENTATIONS
        facts: dict[str, Any] = {
            "shape": shape_of(small),
            "dtype": SHORT[how.dtype],
            "density": 1.0 if dense else plan.density,
        }
        if name in timed.timings:
            facts["host_us"] = host_microseconds(call, how.device)
        op = "dense_fwd" if dense else "block_sparse_fwd"
        found.append(row("host time", op, name, timed, baseline_of(timed), **facts))
    return found
