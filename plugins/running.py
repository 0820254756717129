"""One method on one attention call, and the choice of layers: what every host does alike.

Letters: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, block_sparse_attention
from foveal.plugins.accelerate import AccelerateError, Layers
from foveal.plugins.method import Method
from foveal.plugins.site import Site, State

NOTHING_LEFT_OUT = "with these settings the method leaves nothing out"


class Result(NamedTuple):
    """What a method gave: out [B, H, N, D], or None and the reason; its plan where there is one."""

    out: Tensor | None
    plan: BlockPlan | None = None
    reason: str = ""


def run_method(method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site, state: State) -> Result:
    """q, k, v [B, H, N, D]. A method that writes ``attend`` itself may leave its plan in ``state["plan"]``.

    A plan that visits every pair gives no output: dense attention is faster, and gives the model's own bits.
    """
    reason = method.stands_aside(site)
    if reason is not None:
        return Result(None, reason=reason)
    if type(method).attend is not Method.attend:
        out = method.attend(q, k, v, site, state)
        plan = state.get("plan")
        return Result(out, plan if isinstance(plan, BlockPlan) else None, "the method chose dense attention")
    plan = method.plan(q, k, v, site, state)
    if plan is None:
        return Result(None, reason="the method chose dense attention")
    if plan.pairs == plan.n_queries * plan.n_keys:
        return Result(None, reason=NOTHING_LEFT_OUT)
    return Result(block_sparse_attention(q, k, v, plan, scale=site.scale), plan)


def select(names: Sequence[str], layers: Layers, where: str) -> list[str]:
    """The names that ``layers`` means: None is all; else a predicate, indices (negative from the end), name patterns.

    Raises ``AccelerateError`` for an index outside the list, and where nothing is selected.
    """
    if layers is None:
        chosen = list(names)
    elif callable(layers):
        chosen = [name for name in names if layers(name)]
    else:
        chosen = _listed(names, [layers] if isinstance(layers, str) else list(layers), layers)
    if not chosen:
        some = ", ".join(names[:3])
        raise AccelerateError(
            f"layers={layers!r} selects none of the {len(names)} attention layers of {where} ({some}, ...)."
        )
    return chosen


def _listed(names: Sequence[str], wanted: list[int | str], layers: Layers) -> list[str]:
    indices = {int(i) for i in wanted if not isinstance(i, str)}
    if any(not -len(names) <= i < len(names) for i in indices):
        raise AccelerateError(f"layers={layers!r} names a layer outside 0 to {len(names) - 1}.")
    indices = {i % len(names) for i in indices}
    patterns = [p for p in wanted if isinstance(p, str)]
    return [name for i, name in enumerate(names) if i in indices or any(fnmatch.fnmatchcase(name, p) for p in patterns)]
