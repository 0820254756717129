"""Linear attention without order, beside the same written in PyTorch and softmax attention: rows of `bench kernels`.

Letters: B batch, H heads, N tokens, D head dim.

Notable choices
- "pytorch" is the rule as one would write it, two matrix products in the tensors' own dtype; "pytorch compiled" is the same through
  torch.compile. ``against_compiled`` is the time of the compiled one over the row's, of the same kind (graph or not); ``goal`` is what it
  should reach at least, and what is hoped for.
- Rows named "graph" replay a CUDA graph: the device's time alone.
- The baseline is softmax attention over the same tensors, as for gated linear attention.
- ``useful_tb_per_s`` counts q, k, v and out once each, forward alone.
- The error is that of the last head of the first sample against fp64, and of training the worst of its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.gated_linear import linear_attention
from foveal.kernels.gated_linear.needs import refusal
from foveal.pipelines.bench import competitors
from foveal.pipelines.bench.cases import PlainCase
from foveal.pipelines.bench.linear import GRAPH, graphed, with_gradients
from foveal.pipelines.bench.rounds import How, Rounds
from foveal.pipelines.bench.rows import SHORT, Rows, row
from foveal.pipelines.bench.sparse import draw

Call = Callable[[], Any]
PYTORCH, COMPILED = "pytorch", "pytorch compiled"
EPS = 1e-6
GOAL = (1.3, 2.0)  # of ``against_compiled``, forward


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, H, N, D] -> [B, H, N, D]"""
    q, k, n = torch.relu(q) + EPS, torch.relu(k) + EPS, q.shape[2]
    return (q @ (k.mT @ (v / n))) / (q @ k.mean(2, keepdim=True).mT + EPS)


def calls_of(case: PlainCase, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Everybody, by name: softmax first, then ours, then PyTorch's."""
    names = ("cudnn", "flash2") if q.is_cuda else ("flash2", "math")
    calls: dict[str, Call] = {n: competitors.sdpa(competitors.BACKENDS[n], q, k, v) for n in names}
    linear: dict[str, Call] = {
        n: partial(linear_attention, q, k, v, implementation=n) for n in ("triton", "torch") if refusal(n, q, v) is None
    }
    linear[PYTORCH] = partial(two_products, q, k, v)
    if q.is_cuda:
        linear[COMPILED] = partial(torch.compile(two_products, dynamic=False), q, k, v)
    if case.training:
        return {n: with_gradients(c, [q, k, v]) for n, c in (calls | linear).items()}
    alone = {n + GRAPH: graphed(c) for n, c in linear.items() if q.is_cuda and n in ("triton", COMPILED)}
    return calls | linear | alone


def plain_rows(case: PlainCase, how: How) -> Rows:
    """All competitors of one case, one interleaved measurement."""
    drawn = draw(case.tokens, case.heads, case.head_dim, how.device, how.dtype, case.batch)
    q, k, v = (x.requires_grad_(case.training) for x in drawn)
    calls = calls_of(case, q, k, v)
    timed = how.time(calls)
    baseline = timed.fastest([n for n in calls if competitors.is_sdpa(n)])
    facts: dict[str, Any] = {
        "shape": {"tokens": case.tokens, "heads": case.heads, "head_dim": case.head_dim, "batch": case.batch},
        "dtype": SHORT[how.dtype], "gate": None, "normalisation": "division",
    }  # fmt: skip
    way = "_fwd_bwd" if case.training else "_fwd"
    found = []
    for name in calls:
        op = "dense" if competitors.is_sdpa(name) else "linear"
        more = facts | {"rel_l2": error_of(name, calls, timed, [q, k, v], case.training)} | beside(name, timed)
        more["goal"] = GOAL if name.startswith("triton") and not case.training else None
        if name in timed.timings and not case.training:
            more["useful_tb_per_s"] = 4 * q.numel() * q.element_size() / (1e9 * timed.timings[name].ms)
        found.append(row(case.name, op + way, name, timed, baseline, **more))
    return found


def beside(name: str, timed: Rounds) -> dict[str, float | None]:
    """The compiled rule's time over this one's, of the same kind."""
    other = COMPILED + (GRAPH if name.endswith(GRAPH) else "")
    known = {name, other} <= set(timed.timings) and not competitors.is_sdpa(name)
    return {"against_compiled": timed.timings[other].ms / timed.timings[name].ms if known else None}


def error_of(name: str, calls: dict[str, Call], timed: Rounds, qkv: list[Tensor], training: bool) -> float | None:
    if name not in timed.timings or competitors.is_sdpa(name) or name.endswith(GRAPH):
        return None
    one = [x[:1, -1:].detach().double().requires_grad_(training) for x in qkv]
    out = linear_attention(*one, implementation="torch")
    true = torch.autograd.grad(out.sum(), one) if training else (out,)
    found = calls[name]() if training else (calls[name](),)
    return max(float((a[:1, -1:].double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))
