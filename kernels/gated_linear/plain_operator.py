"""The ``torch.library`` operators behind linear attention's Triton implementation. Letters as in plain_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gated_linear.plain_kernels import attend, key_gradients, query_gradients, token_sums
from foveal.kernels.gated_linear.portable_call import precisions
from foveal.kernels.gated_linear.tiles import padded

PROGRAMS = 264  # about two for every multiprocessor of a large GPU: how far the tokens of a head are split
Sums = tuple[Tensor, Tensor, Tensor]


def fused(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, divide: bool, scale: float, eps: float
) -> Tensor:  # fmt: skip
    return _operator(q, k, v, key_gate, value_gate, divide, scale, eps)[0]


@dataclass(frozen=True)
class Shape:
    """Widths and tiles of a call. values: value channels of a tile; tokens: of a tile."""

    keys: int
    values: int
    tokens: int
    value_tile: int
    warps: int

    def switches(self, keys: int, values: int) -> dict[str, Any]:
        return {
            "DK": keys,
            "DV": values,
            "KP": self.keys,
            "BV": self.value_tile,
            "BN": self.tokens,
            "num_warps": self.warps,
            "num_stages": 2,
        }


def shape_of(keys: int, values: int, element_bytes: int) -> Shape:
    large = max(padded(keys), padded(values)) > 64 or element_bytes == 4
    tile = min(padded(values), 32 if element_bytes == 4 else 64)
    return Shape(padded(keys), padded(values), 32 if large else 64, tile, 8 if padded(keys) > 64 else 4)


def kinds(dtype: torch.dtype) -> tuple[Any, str]:
    """What sums over tokens are multiplied in: their range is that of fp32."""
    return (tl.bfloat16 if dtype == torch.bfloat16 else tl.float32), precisions(dtype)[1]


def _shape(q: Tensor, v: Tensor) -> tuple[Shape, dict[str, Any]]:
    shape = shape_of(q.shape[-1], v.shape[-1], q.element_size())
    kind, product = kinds(q.dtype)
    return shape, shape.switches(q.shape[-1], v.shape[-1]) | {"KIND": kind, "PRODUCT": product}


def _parts(heads: int, tokens: int, tile: int) -> tuple[int, int]:
    """(parts of the tokens, tokens of a part)"""
    tiles = triton.cdiv(tokens, tile)
    parts = max(1, min(tiles, PROGRAMS // heads))
    per = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, per), per * tile


def _gate(x: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    return (other, (0, 0, 0)) if x is None else (x, x.stride()[:3])


def sums(
    k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, eps: float, inverse: float,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Sums:  # fmt: skip
    """-> k^T v [B H, K, V], sum of k [B H, K], sum of v [B H, V]; gated, times inverse, fp32. weights: see token_sums."""
    heads, n = k.shape[0] * k.shape[1], k.shape[2]
    shape, switches = _shape(k, v)
    parts, per = _parts(heads, n, shape.tokens)
    shapes = (k.shape[-1], v.shape[-1]), (k.shape[-1],), (v.shape[-1],)
    made = [k.new_empty((parts, heads, *s), dtype=torch.float32) for s in shapes]
    (kg, kg_strides), (vg, vg_strides) = _gate(key_gate, k), _gate(value_gate, v)
    token_sums[(heads, parts, triton.cdiv(v.shape[-1], shape.value_tile))](
        k, v, kg, vg, *(weights or (made[1], made[2])), *made, *k.stride(), *v.stride(), *kg_strides, *vg_strides, inverse, eps, n, k.shape[1], per,
        HAS_KG=key_gate is not None, HAS_VG=value_gate is not None, WEIGHTED=weights is not None, **switches,
    )  # fmt: skip
    return tuple(x.sum(0) for x in made)  # type: ignore[return-value]


@torch.library.custom_op("foveal::linear_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, divide: bool, scale: float, eps: float
) -> list[Tensor]:  # fmt: skip
    """-> out, and the sums for the backward."""
    made = sums(k, v, key_gate, value_gate, eps if divide else 0.0, 1 / k.shape[2])
    out, (shape, switches) = torch.empty_like(v), _shape(q, v)
    grid = q.shape[0] * q.shape[1], triton.cdiv(q.shape[2], shape.tokens), triton.cdiv(v.shape[-1], shape.value_tile)
    attend[grid](
        q, *made, out, *q.stride(), *out.stride(), scale, eps, q.shape[2], q.shape[1], DIVIDE=divide, **switches
    )
    return [out, *made]


@_operator.register_fake
def _(q, k, v, key_gate, value_gate, divide, scale, eps):
    heads, new = q.shape[0] * q.shape[1], q.new_empty
    shapes = (heads, q.shape[-1], v.shape[-1]), (heads, q.shape[-1]), (heads, v.shape[-1])
    return [torch.empty_like(v), *(new(s, dtype=torch.float32) for s in shapes)]


@torch.library.custom_op("foveal::linear_attention_backward", mutates_args=())
def _backward_operator(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None,
    pairs: Tensor, keys: Tensor, values: Tensor, divide: bool, scale: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    (shape, switches), n, add = _shape(q, v), q.shape[2], eps if divide else 0.0
    grid = q.shape[0] * q.shape[1], triton.cdiv(n, shape.tokens)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    outer, along, rest = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(3))
    query_gradients[grid](
        q, d_out, pairs, keys, values, dq, outer, along, rest, *q.stride(), *d_out.stride(), *dq.stride(), scale, eps, n, q.shape[1],
        DIVIDE=divide, **switches,
    )  # fmt: skip
    totals = sums(q, d_out, None, outer[..., None], add, 1.0, (along, rest))
    d_gates = [None if g is None else q.new_empty(q.shape[:3], dtype=torch.float32) for g in (key_gate, value_gate)]
    (kg, kg_strides), (vg, vg_strides) = _gate(key_gate, k), _gate(value_gate, v)
    key_gradients[grid](
        k, v, kg, vg, *totals, dk, dv, *(outer if g is None else g for g in d_gates),
        *k.stride(), *v.stride(), *kg_strides, *vg_strides, *dk.stride(), *dv.stride(), 1 / n, add, n, q.shape[1],
        HAS_KG=key_gate is not None, HAS_VG=value_gate is not None, **switches,
    )  # fmt: skip
    named = zip(d_gates, (key_gate, value_gate), strict=True)
    return [dq, dk, dv, *(g[..., None].to(to.dtype) for g, to in named if g is not None and to is not None)]


@_backward_operator.register_fake
def _(d_out, q, k, v, key_gate, value_gate, pairs, keys, values, divide, scale, eps):
    made = [torch.empty_like(x) for x in (q, k, v)]
    return made + [x.new_empty(x.shape) for x in (key_gate, value_gate) if x is not None]


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, ctx.divide, ctx.scale, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    *tensors, pairs, keys, values = ctx.saved_tensors
    made = iter(_backward_operator(grads[0], *tensors, pairs, keys, values, ctx.divide, ctx.scale, ctx.eps))
    return *(None if x is None else next(made) for x in tensors), None, None, None


_operator.register_autograd(_backward, setup_context=_setup)
