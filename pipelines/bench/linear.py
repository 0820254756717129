"""Gated linear attention beside fla's kernels and softmax attention: rows of `bench kernels`.

Letters: B batch, H heads, N tokens, K = V head dim.

Notable choices
- Rows named "graph" replay a CUDA graph: the device's time alone. The others are called as a model would, host included.
- Density is 1 and the baseline is dense softmax attention over the same tensors: ``speedup`` is what linear attention buys at this
  length. ``against_fla`` is fla's time over the row's, of the same kind (graph or not), null where fla did not run.
- Training rows are one forward and the gradients of q, k, v and the gate; softmax has no gate.
- ``against_one`` is the time of both directions in one call over that of one direction.
- The error is that of the last head of the first sample, against the recurrence in fp64; in training the worst of its gradients, against
  those of the chunked rule in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.gated_linear import bidirectional_gated_linear_attention, gated_linear_attention
from foveal.kernels.gated_linear.needs import refusal
from foveal.pipelines.bench import competitors, peers
from foveal.pipelines.bench.cases import LinearCase
from foveal.pipelines.bench.rounds import How, Rounds
from foveal.pipelines.bench.rows import SHORT, Rows, row
from foveal.pipelines.bench.sparse import draw

Call = Callable[[], Any]
GRAPH = ", graph"
BOTH = ", both directions"


def graphed(call: Call) -> Call:
    """The same call as a CUDA graph, captured at its first use. An operator that waits for the device cannot be captured and raises."""
    held: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not held:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            held.append(graph)
        held[0].replay()

    return replay


def with_gradients(call: Call, inputs: list[Tensor]) -> Call:
    """A call followed by the gradients of its inputs."""
    grad: list[Tensor] = []

    def both() -> Any:
        out = call()
        if not grad:
            grad.append(torch.ones_like(out))
        return torch.autograd.grad(out, inputs, grad[0])

    return both


def calls_of(case: LinearCase, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> dict[str, Call]:
    """Everybody, by name: dense softmax first, then ours, then fla."""
    names = ("cudnn", "flash2") if q.is_cuda else ("flash2", "math")
    dense: dict[str, Call] = {n: competitors.sdpa(competitors.BACKENDS[n], q, k, v) for n in names}
    linear: dict[str, Call] = {}
    for name in ("triton", "torch"):
        if refusal(name, q, v) is None:
            linear[name] = partial(gated_linear_attention, q, k, v, gate, implementation=name)
            linear[name + BOTH] = partial(
                bidirectional_gated_linear_attention, q, k, v, gate, gate, implementation=name
            )
    linear |= peers.fla(q, k, v, gate) if q.is_cuda else {}
    if case.training:
        return {n: with_gradients(c, [q, k, v]) for n, c in dense.items()} | {
            n: with_gradients(c, [q, k, v, gate]) for n, c in linear.items()
        }
    device_alone = {n + GRAPH: graphed(c) for n, c in linear.items() if q.is_cuda and not n.startswith("torch")}
    return dense | linear | device_alone


def linear_rows(case: LinearCase, how: How) -> Rows:
    """All competitors of one case, one interleaved measurement."""
    q, k, v = (
        x.requires_grad_(case.training)
        for x in draw(case.tokens, case.heads, case.head_dim, how.device, how.dtype, case.batch)
    )
    gen = torch.Generator(how.device).manual_seed(2)
    shape = (case.batch, case.tokens, case.heads) + ((case.head_dim,) if case.gate == "vector" else ())
    gate = (
        F.logsigmoid(torch.randn(shape, device=how.device, generator=gen) + 3.0)
        .transpose(1, 2)
        .requires_grad_(case.training)
    )
    calls = calls_of(case, q, k, v, gate)
    timed = how.time(calls)
    baseline = timed.fastest([n for n in calls if competitors.is_sdpa(n)])
    facts: dict[str, Any] = {
        "shape": {"tokens": case.tokens, "heads": case.heads, "head_dim": case.head_dim, "batch": case.batch},
        "dtype": SHORT[how.dtype], "gate": case.gate,
    }  # fmt: skip
    way = "_fwd_bwd" if case.training else "_fwd"
    found = []
    for name in calls:
        op = "dense" if competitors.is_sdpa(name) else "gated_linear"
        more = (
            facts
            | {"rel_l2": error_of(name, calls, timed, [q, k, v, gate], case.training)}
            | against_fla(name, timed)
            | against_one(name, timed)
        )
        found.append(row(case.name, op + way, name, timed, baseline, **more))
    return found


def error_of(name: str, calls: dict[str, Call], timed: Rounds, qkvg: list[Tensor], training: bool) -> float | None:
    """Of those that have an output to look at."""
    if name not in timed.timings or competitors.is_sdpa(name) or name.endswith(GRAPH):
        return None
    if training:
        return gradient_error(calls[name](), qkvg, BOTH in name)
    one = [x[:1, -1:].detach().double() for x in qkvg]
    rule = gated_linear_attention(*one, implementation="reference")
    if BOTH in name:
        rule = rule + gated_linear_attention(*one, reverse=True, implementation="reference")
    out: Tensor = calls[name]()[:1, -1:].double()
    return float((out - rule).norm() / rule.norm())


def gradient_error(found: tuple[Tensor, ...], qkvg: list[Tensor], both: bool) -> float:
    """The largest relative error among the gradients of the sum of outputs, of one head."""
    one = [x[:1, -1:].detach().double().requires_grad_() for x in qkvg]
    out = gated_linear_attention(*one, implementation="torch")
    if both:
        out = out + gated_linear_attention(*one, reverse=True, implementation="torch")
    true = torch.autograd.grad(out.sum(), one)
    return max(float((a[:1, -1:].double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


def against_one(name: str, timed: Rounds) -> dict[str, float | None]:
    """What both directions cost beside one, of those that have both; medians of the same rounds."""
    one = name.replace(BOTH, "")
    known = BOTH in name and {name, one} <= set(timed.timings)
    return {"against_one": timed.ratio(name, one)[0] if known else None}


def against_fla(name: str, timed: Rounds) -> dict[str, float | None]:
    """fla's time over this one's, of the same kind."""
    kind = [t for n, t in timed.timings.items() if n.startswith("fla ") and n.endswith(GRAPH) == name.endswith(GRAPH)]
    known = bool(kind) and name in timed.timings and not competitors.is_sdpa(name)
    return {"against_fla": kind[0].ms / timed.timings[name].ms if known else None}
