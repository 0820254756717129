"""Timing one attention call honestly: real q, k, v of a layer, every method in turn, the whole operator.

B batch, H heads, N tokens, D head dim.

Notable choices
- q, k, v are captured from a layer in the middle of the network while the model runs; noise has no locality, real keys do.
- The operator is what a model pays when it calls a method: order + plan + kernel + inverse order. A static plan is made once
  and kept, here as in a model; a plan that depends on q and k is made in every call.
- The baseline is the fastest SDPA backend on this machine, found by trying each of them.
- Rounds go A, B, C, A, B, C, ... after warm-up, so that a machine that slows down slows all of them; medians and quartiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from foveal.kernels.block_sparse import BlockPlan
from foveal.pipelines.host_info import synchronize
from foveal.pipelines.metrics.noise_floor import sdpa_backends
from foveal.pipelines.statistics import median_iqr
from foveal.plugins.method import Method
from foveal.plugins.record import Capture
from foveal.plugins.site import State

WARM_UP = 3
INCLUDES = ("order", "plan", "kernel", "inverse")


def fastest_sdpa(call: Capture, tries: int = 3) -> tuple[str, Callable[[], Tensor]]:
    """The fastest SDPA backend for a call -> (name, operator)."""
    best: tuple[float, str, Callable[[], Tensor]] | None = None
    for name, backend in sdpa_backends(call.q.device).items():
        operator = sdpa_operator(call, backend)
        try:
            operator()
            seconds = min(clock(operator, call.q.device) for _ in range(tries))
        except RuntimeError:
            continue  # this backend does not take the call; another one does
        if best is None or seconds < best[0]:
            best = (seconds, f"sdpa {name}", operator)
    if best is None:
        return "sdpa", sdpa_operator(call, None)
    return best[1], best[2]


def sdpa_operator(call: Capture, backend: Any) -> Callable[[], Tensor]:
    """Dense attention of a call with one SDPA backend, or the default choice for None."""

    def operator() -> Tensor:
        with sdpa_kernel([backend]) if backend is not None else nullcontext():
            return scaled_dot_product_attention(call.q, call.k, call.v, scale=call.site.scale)

    return operator


def clock(operator: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    operator()
    synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def time_operators(
    call: Capture, methods: Mapping[str, Method], rounds: int, tick: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Time methods and the dense baseline on one call, interleaved.

    -> per id: {"median_s", "iqr", "n", "ratio", "efficiency", "density", "includes", "baseline"}; "dense" is the baseline.
    A method that runs this call dense has ratio None and says so in "note".
    """
    baseline, dense = fastest_sdpa(call)
    operators: dict[str, Callable[[], Any]] = {"dense": dense}
    plans: dict[str, BlockPlan | None] = {}
    for name, method in methods.items():
        if method.name == "dense":
            continue
        state = State()
        plans[name] = method.plan(call.q, call.k, call.v, call.site, state)
        operators[name] = attend_operator(method, call, state)
    seconds: dict[str, list[float]] = {name: [] for name in operators}
    for round_ in range(-WARM_UP, rounds):
        for name, operator in operators.items():
            spent = clock(operator, call.q.device)
            if round_ >= 0:
                seconds[name].append(spent)
        tick()
    dense_median = median_iqr(seconds["dense"])["median_s"]
    return {name: entry(seconds[name], dense_median, plans.get(name), baseline) for name in operators}


def attend_operator(method: Method, call: Capture, state: State) -> Callable[[], Tensor | None]:
    """One call of a method the way the host makes it."""
    return lambda: method.attend(call.q, call.k, call.v, call.site, state)


def entry(seconds: list[float], dense_median: float, plan: BlockPlan | None, baseline: str) -> dict[str, Any]:
    """The `operator` entry of one method."""
    timing = median_iqr(seconds)
    density = 1.0 if plan is None else plan.density
    ratio = dense_median / timing["median_s"]
    return {
        **timing, "ratio": ratio, "efficiency": ratio * density, "density": density, "includes": list(INCLUDES),
        "baseline": baseline,
    }  # fmt: skip
