"""The static methods as plain functions of q, k, v and a grid, and as a module for models of one's own.

Letters: B batch, H heads, Hkv key heads, S = grid tokens + global tokens, D head dim, M extra keys, C channels.

* Global tokens (text, class, register) see everything valid and are seen by everything; extra keys are seen by everything.
* The plan is made once per (knobs, grid, counts, device); a new text length does not rebuild it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention
from foveal.plugins.layout import Layout
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import MethodError


def grat_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], config: GRAT | None = None, **call: Any
) -> Any:
    """Grouped attention. q [B, H, S, D], k, v [B, Hkv, S, D] with grid tokens row-major -> [B, H, S, D] with q's strides.

    config   default ``GRAT()``; its schedule knobs (dense steps, layers) have no meaning here
    call     n_global, n_valid, global_first, extra_k, extra_v, scale, return_lse, options: see ``neighborhood_attention``
    """
    return _attend(config or GRAT(), q, k, v, grid, **call)


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], config: Neighborhood | None = None, **call: Any
) -> Any:
    """Neighbourhood attention. q [B, H, S, D], k, v [B, Hkv, S, D] with grid tokens row-major -> [B, H, S, D] with q's strides.

    config         default ``Neighborhood()``
    n_global       text, class or register tokens in the sequence, after the grid tokens, or before them with ``global_first``
    n_valid        how many lead global tokens are real keys: a number, or an integer tensor [B] on q's device; None: all
    extra_k, extra_v   [B, Hkv, M, D] further keys and values that every query sees
    scale          softmax scale, default D ** -0.5; 0 is used as 0
    return_lse     also return the log-sum-exp, fp32 [B, H, S]
    options        ``KernelOptions``, for instance an implementation by name

    Raises ``MethodError`` (a ValueError) in one sentence where sizes do not fit each other.
    """
    return _attend(config or Neighborhood(), q, k, v, grid, **call)


def _attend(
    method: GRAT | Neighborhood, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], *, n_global: int = 0,
    n_valid: int | Tensor | None = None, global_first: bool = False, extra_k: Tensor | None = None, extra_v: Tensor | None = None,
    scale: float | None = None, return_lse: bool = False, options: KernelOptions | None = None,
) -> Any:  # fmt: skip
    if isinstance(n_global, bool) or not isinstance(n_global, int) or n_global < 0:
        raise MethodError(f"n_global is {n_global!r}; it is a number of tokens.")
    extra = _extra_keys(k, extra_k, extra_v)
    layout = Layout.joint(tuple(grid), n_global, global_first, extra).check()
    if extra_k is not None and extra_v is not None:
        k, v = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2)
    layout.check_tensors(q, k, v)
    plan = method.static_plan(layout, q.device).with_valid_text(_valid(n_valid, n_global, q))
    if return_lse:
        return block_sparse_attention(q, k, v, plan, scale=scale, return_lse=True, options=options)
    return block_sparse_attention(q, k, v, plan, scale=scale, options=options)


def _extra_keys(k: Tensor, extra_k: Tensor | None, extra_v: Tensor | None) -> int:
    if extra_k is None and extra_v is None:
        return 0
    if extra_k is None or extra_v is None:
        raise MethodError("only one of extra_k and extra_v is given; extra keys need their values.")
    want = (k.shape[0], k.shape[1], extra_k.shape[2] if extra_k.ndim == 4 else "M", k.shape[3])
    if tuple(extra_k.shape) != want or tuple(extra_v.shape) != want:
        raise MethodError(
            f"extra_k {tuple(extra_k.shape)} and extra_v {tuple(extra_v.shape)} must both be {want}, like k but for the length."
        )
    return extra_k.shape[2]


def _valid(n_valid: int | Tensor | None, n_global: int, q: Tensor) -> Tensor | None:
    if n_valid is None:
        return None
    if isinstance(n_valid, Tensor):
        if n_valid.shape != (q.shape[0],) or n_valid.is_floating_point():
            raise MethodError(
                f"n_valid is {n_valid.dtype} {tuple(n_valid.shape)}; give whole numbers, one per sample: ({q.shape[0]},)."
            )
        if n_valid.device != q.device:
            raise MethodError(f"n_valid lies on {n_valid.device}, q on {q.device}; move it there.")
        if n_valid.device.type == "cpu" and not bool(((n_valid >= 0) & (n_valid <= n_global)).all()):
            raise MethodError(f"n_valid {n_valid.tolist()} must lie in 0..{n_global}, the number of global tokens.")
        return n_valid
    if isinstance(n_valid, bool) or not 0 <= n_valid <= n_global:
        raise MethodError(f"n_valid is {n_valid}; it must lie in 0..{n_global}, the number of global tokens.")
    return torch.full((1,), n_valid, dtype=torch.int32, device=q.device)


class NeighborhoodAttention(nn.Module):
    """Self-attention with a neighbourhood, for models of one's own: projections, heads, output projection.

    dim, heads   channels and heads; dim must be a multiple of heads
    config       ``Neighborhood``, or its knobs: ``NeighborhoodAttention(64, 4, window=7)``
    """

    def __init__(
        self, dim: int, heads: int, config: Neighborhood | None = None, *, bias: bool = True, **knobs: Any
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise MethodError(f"{dim} channels do not split into {heads} heads; make dim a multiple of heads.")
        self.heads = heads
        self.config = dataclasses.replace(config, **knobs) if config else Neighborhood(**knobs)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None, n_global: int = 0) -> Tensor:
        """x [B, *grid, C], or [B, S, C] with ``grid`` and ``n_global`` lead tokens (class, registers) -> x's shape."""
        grid = tuple(x.shape[1:-1]) if grid is None else tuple(grid)
        tokens = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = neighborhood_attention(q, k, v, grid, self.config, n_global=n_global, global_first=True)
        return self.proj(out.transpose(1, 2).flatten(2)).reshape(x.shape)
