"""The operator behind ``block_sparse_attention``: one eager entry, and one ``torch.library`` operator for compilers and autograd.

A plan enters the operator as flat tensors and integers, so that compiled graphs see tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse.gather import gather_attention, lse_dtype
from foveal.kernels.block_sparse.gather_backward import gather_backward
from foveal.kernels.block_sparse.plan import BlockPlan, Box, Proxies
from foveal.kernels.block_sparse.reference import reference_attention
from foveal.kernels.merge import merge_attention

Init = tuple[Tensor, Tensor]
PLAIN = ("q_start", "q_len", "kv_start", "kv_len", "count", "n_full", "index")
OPTIONAL = ("q_order", "kv_order", "row_bits", "block_bias", "key_bias")


def run(
    name: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, need_lse: bool, init: Init | None
) -> tuple[Tensor, Tensor | None]:
    """Run one implementation, outside autocast: it would change dtypes inside. -> (out with q's strides, lse or None)."""
    if not torch.is_autocast_enabled(q.device.type):  # entering the context costs more than asking
        return _run(name, q, k, v, plan, scale, need_lse, init)
    with torch.autocast(q.device.type, enabled=False):
        return _run(name, q, k, v, plan, scale, need_lse, init)


def _run(
    name: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, need_lse: bool, init: Init | None
) -> tuple[Tensor, Tensor | None]:
    if name == "hopper":
        from foveal.kernels.block_sparse.hopper_call import hopper_attention

        return hopper_attention(q, k, v, plan, scale, need_lse, init)
    if name == "triton":
        from foveal.kernels.block_sparse.portable_call import triton_attention

        return triton_attention(q, k, v, plan, scale, need_lse, init)
    if name == "reference":
        out, lse = reference_attention(q, k, v, plan, scale)
        result = torch.empty_like(q).copy_(out), lse.to(lse_dtype(q))
    else:
        out, maybe = gather_attention(q, k, v, plan, scale, need_lse or init is not None)
        if maybe is None:
            return out, None
        result = out, maybe
    return result if init is None else merge_attention(result, init)


def traced(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, name: str, need_lse: bool) -> Init:
    """The same through the library operator: for compiled graphs and for gradients. The lse is empty unless asked for."""
    proxy_k, proxy_v = (plan.proxies.k, plan.proxies.v) if plan.proxies is not None else (None, None)
    tensors, fields, sizes = flatten(plan)
    return _operator(q, k, v, proxy_k, proxy_v, tensors, fields, sizes, scale, name, need_lse)


def flatten(plan: BlockPlan) -> tuple[list[Tensor], str, list[int]]:
    """Plan -> tensors, their names, and its integers (proxies' k and v travel apart: they have gradients)."""
    named: dict[str, Tensor | None] = {n: getattr(plan, n) for n in (*PLAIN, *OPTIONAL)}
    if plan.box is not None:
        named |= {"low": plan.box.low, "high": plan.box.high, "coord": plan.box.coord}
    if plan.proxies is not None:
        named |= {"proxy_n": plan.proxies.n, "proxy_var": plan.proxies.k_var}
    live = {n: x for n, x in named.items() if x is not None}
    ranges = [x for pair in plan.dense_rows for x in pair]
    sizes = [plan.n_queries, plan.n_keys, plan.max_q_len, plan.max_kv_len, int(bool(plan.covers)), int(plan.ordered)]
    sizes += [int(plan.list_order == "address")]
    spans = [x for pair in (plan.box.span or () if plan.box is not None else ()) for x in pair]
    cell = () if plan.box is None or plan.box.cell is None else plan.box.cell
    cells = [x for axis in cell for x in axis]
    sizes += [-1 if plan.spread is None else round(1000 * plan.spread)]
    sizes += [int(bool(plan.tiled)), plan.kv_stride, len(spans), *spans, len(cell), len(cells), *cells, *ranges]
    return list(live.values()), ",".join(live), sizes


def unflatten(
    tensors: list[Tensor], fields: str, sizes: list[int], proxy_k: Tensor | None, proxy_v: Tensor | None
) -> BlockPlan:
    named: dict[str, Any] = dict(zip(fields.split(","), tensors, strict=True))
    spans, rest = sizes[11 : 11 + sizes[10]], sizes[11 + sizes[10] :]
    axes, cells, ranges = rest[0], rest[2 : 2 + rest[1]], rest[2 + rest[1] :]
    width = len(cells) // max(1, axes)
    cell = tuple(tuple(cells[i * width : (i + 1) * width]) for i in range(axes)) or None
    box = None
    if "low" in named:
        box = Box(named.pop("low"), named.pop("high"), named.pop("coord"), span=tuple(pairs(spans)), cell=cell)
    n, var = named.pop("proxy_n", None), named.pop("proxy_var", None)
    proxies = None if proxy_k is None or proxy_v is None else Proxies(proxy_k, proxy_v, n, var)
    return BlockPlan(
        n_queries=sizes[0], n_keys=sizes[1], max_q_len=sizes[2], max_kv_len=sizes[3], covers=bool(sizes[4]), ordered=bool(sizes[5]),
        list_order="address" if sizes[6] else "priority", spread=None if sizes[7] < 0 else sizes[7] / 1000, tiled=bool(sizes[8]),
        kv_stride=sizes[9],
        dense_rows=tuple(pairs(ranges)), box=box, proxies=proxies, trusted=True, **named,
    )  # fmt: skip


def pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@torch.library.custom_op("foveal::block_sparse_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, proxy_k: Tensor | None, proxy_v: Tensor | None,
    tensors: list[Tensor], fields: str, sizes: list[int], scale: float, name: str, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = unflatten(tensors, fields, sizes, proxy_k, proxy_v)
    out, lse = run(name, q, k, v, plan, scale, need_lse, None)
    return out, q.new_empty(0, dtype=lse_dtype(q)) if lse is None else lse.contiguous()


@_operator.register_fake
def _(q, k, v, proxy_k, proxy_v, tensors, fields, sizes, scale, name, need_lse):
    return torch.empty_like(q), q.new_empty(q.shape[:3] if need_lse else (0,), dtype=lse_dtype(q))


@torch.library.custom_op("foveal::block_sparse_attention_backward", mutates_args=())
def _backward_operator(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    proxy_k: Tensor | None, proxy_v: Tensor | None, tensors: list[Tensor], fields: str, sizes: list[int], scale: float,
) -> list[Tensor]:  # fmt: skip
    plan = unflatten(tensors, fields, sizes, proxy_k, proxy_v)
    with torch.autocast(q.device.type, enabled=False):
        grads = gather_backward(d_out, d_lse, q, k, v, out, lse, plan, scale)
    return [g for g in grads if g is not None]


@_backward_operator.register_fake
def _(d_out, d_lse, q, k, v, out, lse, proxy_k, proxy_v, tensors, fields, sizes, scale):
    return [x.new_empty(x.shape) for x in (q, k, v, proxy_k, proxy_v) if x is not None]


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, proxy_k, proxy_v, tensors, fields, sizes, scale, name, need_lse = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, proxy_k, proxy_v, *tensors)
    ctx.fields, ctx.sizes, ctx.scale, ctx.name, ctx.need_lse = fields, sizes, scale, name, need_lse


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple:
    q, k, v, out, lse, proxy_k, proxy_v, *tensors = ctx.saved_tensors
    if not ctx.need_lse:  # the forward had no use for it; the backward has
        _, lse = _operator(q, k, v, proxy_k, proxy_v, tensors, ctx.fields, ctx.sizes, ctx.scale, ctx.name, True)
    grad_lse = d_lse if ctx.need_lse else None
    args = (q, k, v, out, lse, proxy_k, proxy_v, tensors, ctx.fields, ctx.sizes, ctx.scale)
    grads = _backward_operator(d_out, grad_lse, *args)
    pooled = tuple(grads[3:5]) if proxy_k is not None else (None, None)
    return *grads[:3], *pooled, [None] * len(tensors), None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)
