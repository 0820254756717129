"""``block_sparse_attention``: checks, the choice of an implementation, and nothing else.

Letters as in plan.py; D head dim, Hkv key heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from foveal.kernels.block_sparse import operator
from foveal.kernels.block_sparse.checks import PlanError
from foveal.kernels.block_sparse.needs import IMPLEMENTATIONS, slower
from foveal.kernels.block_sparse.operator import Init
from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.block_sparse.plan_forms import derived
from foveal.kernels.choosing import Choice, pick
from foveal.kernels.merge import merge_attention


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """How a call may run. implementation: one of ``IMPLEMENTATIONS``, or None for the first that can take the call."""

    implementation: str | None = None


def choose(
    q: Tensor, plan: BlockPlan | None = None, options: KernelOptions | None = None, *,
    k: Tensor | None = None, v: Tensor | None = None, scale: float | None = None,
) -> Choice:  # fmt: skip
    """Which implementation takes q [B, H, N, D] with this plan. Raises ValueError when the one asked for by name cannot."""
    wanted = options.implementation if options else None

    def refusal(name: str) -> str | None:
        needs = IMPLEMENTATIONS[name]
        why = needs.refusal(q, by_name=wanted is not None)
        if why is None and plan is not None:
            why = needs.call_refusal(q, plan, k, v, scale)
            if why is None and wanted is None:
                why = slower(name, plan)
        return why

    return pick(IMPLEMENTATIONS, wanted, tuple(q.shape), refusal)


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = ..., init: tuple[Tensor, Tensor] | None = ...,
    return_lse: Literal[False] = ..., options: KernelOptions | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = ..., init: tuple[Tensor, Tensor] | None = ...,
    return_lse: Literal[True], options: KernelOptions | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None, init: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False, options: KernelOptions | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention over the keys that ``plan`` lets each query visit.

    q            [B, H, N, D] with any strides ([B, N, H, D] data: pass ``x.transpose(1, 2)``); fp16, bf16, fp32 (fp64 in PyTorch)
    k, v         [B, Hkv, M, D], Hkv divides H
    plan         on q's device, for N queries and M keys; its orders are applied and undone here unless it says ``ordered``
    scale        softmax scale, default D ** -0.5; 0 is used as 0
    init         (out, lse) of earlier keys: the result covers both (resume)
    return_lse   also return the log-sum-exp, fp32 [B, H, N], natural log, -inf for a query without keys

    -> out [B, H, N, D] with q's dtype and strides, or (out, lse). Differentiable in q, k, v and the proxies' k and v.
    Raises ValueError in one sentence for inputs that do not fit each other or the plan, or that no implementation takes.
    """
    _check_plain(q, k, v)
    softmax_scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    compiling = torch.compiler.is_compiling()
    name = (_admit if compiling else _admitted)(q, k, v, plan, softmax_scale, init, options)
    differentiable = torch.is_grad_enabled() and _differentiable(q, k, v, plan)
    if differentiable or compiling:
        need_lse = return_lse or init is not None or differentiable  # the backward would have to make it again
        out, lse = operator.traced(q, k, v, plan, softmax_scale, name, need_lse)
        if init is not None:
            out, lse = merge_attention((out, lse), init)
        return (out, lse) if return_lse else out
    out, got = operator.run(name, q, k, v, plan, softmax_scale, return_lse, init)
    if not return_lse:
        return out
    assert got is not None
    return out, got


def _admitted(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, init: Init | None, options: KernelOptions | None
) -> str:
    """``_admit``, worked out once for every kind of call that a plan sees: everything that is asked there is in the key."""
    kind = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), k.storage_offset() % 16, v.storage_offset() % 16, scale,
        q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, None if init is None else (init[0].shape, init[1].shape), options,
    )  # fmt: skip
    names: dict[Any, str] = derived(plan, "names", lambda _: {})
    name = names.get(kind)
    if name is None:
        name = names[kind] = _admit(q, k, v, plan, scale, init, options)
    return name


def _admit(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, init: Init | None, options: KernelOptions | None
) -> str:
    """Check the call and name the implementation that takes it."""
    _check_call(q, k, v, plan, init)
    return choose(q, plan, options, k=k, v=v, scale=scale).name


def _differentiable(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> bool:
    proxies = plan.proxies
    held = (plan.block_bias, plan.key_bias, *(() if proxies is None else (proxies.n, proxies.k_var)))
    if any(x is not None and x.requires_grad for x in held):
        raise ValueError(
            "biases, proxy counts and key variances have no gradient here; detach them before they enter the plan."
        )
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return proxies is not None and (proxies.k.requires_grad or proxies.v.requires_grad)


def _check_plain(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.layout != torch.strided or x.is_nested:
            raise ValueError(f"{name} is {x.layout} or nested; block_sparse_attention needs plain strided tensors.")


def _check_call(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, init: Init | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; [batch, heads, tokens, head_dim] is needed.")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; give all three one dtype and device."
            )
    b, h, n, d = q.shape
    if k.shape != v.shape or k.shape[0] != b or k.shape[3] != d:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} do not go with q {tuple(q.shape)}: same batch and head_dim, k and v alike."
        )
    if k.shape[1] == 0 or h % k.shape[1]:
        raise ValueError(
            f"q has {h} heads and k has {k.shape[1]}; the query heads must be a multiple of the key heads."
        )
    if n != plan.n_queries or k.shape[2] != plan.n_keys:
        raise ValueError(
            f"the plan is for {plan.n_queries} queries and {plan.n_keys} keys; q has {n} and k has {k.shape[2]}: make a plan for this length."
        )
    if plan.device != q.device:
        raise ValueError(
            f"the plan lies on {plan.device} and q on {q.device}; move it once with plan.to({str(q.device)!r})."
        )
    for name in (
        "q_start",
        "q_len",
        "kv_start",
        "kv_len",
        "count",
        "n_full",
        "index",
        "row_bits",
        "block_bias",
        "key_bias",
    ):
        x = getattr(plan, name)
        # Written out: torch 2.11 compiles `in` of a symbolic size wrongly.
        if x is not None and ((x.shape[0] != 1 and x.shape[0] != b) or (x.shape[1] != 1 and x.shape[1] != h)):
            raise PlanError(
                f"plan.{name} is for {tuple(x.shape[:2])} batch items and heads; the call has ({b}, {h}), and 1 means shared."
            )
    if plan.kv_order is not None and plan.kv_order.ndim == 3 and not plan.ordered and k.shape[1] != h:
        raise PlanError(
            f"plan.kv_order differs by head, but {h} query heads share {k.shape[1]} key heads; repeat k and v per query head first."
        )
    if plan.proxies is not None and plan.proxies.k.shape != (b, k.shape[1], plan.n_kv_blocks, d):
        want = (b, k.shape[1], plan.n_kv_blocks, d)
        raise PlanError(f"plan.proxies.k has shape {tuple(plan.proxies.k.shape)}; {want} is needed for these keys.")
    if init is not None and (init[0].shape != q.shape or init[1].shape != q.shape[:3]):
        raise ValueError(
            f"init is (out {tuple(init[0].shape)}, lse {tuple(init[1].shape)}); shapes {tuple(q.shape)} and {tuple(q.shape[:3])} are needed."
        )
