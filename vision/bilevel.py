"""Bi-level routing attention: every region of the image chooses the few regions that its tokens look at.

Letters: B batch, C width, H, W map, N = H W tokens, R regions, L tokens of a region, K regions chosen, h heads, d head dim.

* A region is a run of tokens once the map is in region order, so a choice of regions is a plan for the block-sparse kernel: no copy of
  keys and values is made. Regions of fewer than 16 tokens are smaller than any kernel's tile and are gathered instead.
* The choice carries no gradient. It is one for all heads, from the mean query and mean key of every region.
* Any map works: the last regions of an axis are smaller and nothing is padded. The released implementations pad, and let queries see
  the padding; where regions divide the map, all agree.
* Compilers step around the routing: one break in the graph per layer.
* The softmax is scaled by the full width, C ** -0.5, as published, unless ``scale`` says otherwise.

Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention" (Zhu et al., 2023), equations 2 to 7.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from foveal.kernels.block_sparse import BlockPlan, block_sparse_attention
from foveal.plugins.order import Order, order_of

SMALLEST_BLOCK = 16
NOT_SCRIPTABLE = (
    "BiFormer cannot be turned into TorchScript, because its attention runs through operators that TorchScript cannot hold; "
    "use torch.compile or torch.export instead."
)


def regions_of(height: int, width: int, n_win: int) -> Order:
    """The order that lays a map out in at most n_win x n_win regions of equal size (smaller at the far borders)."""
    return order_of((height, width), (-(-height // n_win), -(-width // n_win)))


def choose_regions(q: Tensor, k: Tensor, order: Order, topk: int) -> Tensor:
    """q, k [B, H, W, C] -> int64 [B, R, K], ascending: the regions whose mean key is most like the region's mean query."""
    means = [_region_means(x.detach(), order) for x in (q, k)]
    chosen = (means[0] @ means[1].transpose(1, 2)).topk(min(topk, len(order.start)), dim=-1).indices
    return chosen.sort(dim=-1).values


def _region_means(x: Tensor, order: Order) -> Tensor:
    """[B, H, W, C] -> fp32 [B, R, C]"""
    x = x.permute(0, 3, 1, 2).float()
    return F.avg_pool2d(x, order.tile, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)


def region_plan(chosen: Tensor, order: Order) -> BlockPlan:
    """int [B, R, K] -> the plan of tokens that lie in region order already. Nothing waits for the device."""
    batch, regions, kept = chosen.shape
    order = order.on(chosen.device)
    n, longest = order.tokens, order.tile[0] * order.tile[1]
    even = longest * regions == n
    count = torch.full((batch, 1, regions), kept, dtype=torch.int32, device=chosen.device)
    return BlockPlan(
        n_queries=n, n_keys=n, q_start=order.start, q_len=order.length, kv_start=order.start, kv_len=order.length,
        count=count, n_full=count, index=chosen[:, None].to(torch.int32), q_order=order.token, kv_order=order.token, ordered=True,
        max_q_len=longest, max_kv_len=longest, covers=True, kv_stride=longest if even and regions > 1 else 0,
        tiled=even and regions > 1, pairs=n * kept * longest if even else None, spread=0.0, trusted=True, label=f"regions top {kept} of {regions}",
    )  # fmt: skip


@register_notrace_function
@torch.compiler.disable(reason="which regions are chosen is known only while it runs")
def bilevel_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, n_win: int, topk: int, scale: float) -> Tensor:
    """q, k, v [B, H, W, C] of one type -> [B, H, W, C]

    Raises ``ValueError`` where C is not a multiple of ``heads``, or n_win or topk is less than 1.
    """
    height, width, dim = q.shape[1:]
    _check(dim, heads, n_win, topk)
    order = regions_of(height, width, n_win).on(q.device)
    chosen = choose_regions(q, k, order, topk)
    q, k, v = (_split(order.permute(x.flatten(1, 2)), heads) for x in (q, k, v))
    longest = order.tile[0] * order.tile[1]
    if longest < SMALLEST_BLOCK and longest * len(order.start) == order.tokens:
        out = _gathered(q, k, v, chosen, longest, scale)
    else:
        out = block_sparse_attention(q, k, v, region_plan(chosen, order), scale=scale)
    return order.restore(out.transpose(1, 2).flatten(2)).unflatten(1, (height, width))


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, h, N, d]"""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _gathered(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, scale: float) -> Tensor:
    """q, k, v [B, h, N, d] in region order, chosen [B, R, K], regions of ``size`` tokens each -> [B, h, N, d]"""
    batch, heads, n, d = q.shape
    token = chosen[..., None] * size + torch.arange(size, device=q.device)  # [B, R, K, L]
    token = token.flatten(1)[:, None, :, None].expand(-1, heads, -1, d)
    k, v = (x.gather(2, token).view(batch, heads, n // size, -1, d) for x in (k, v))
    return F.scaled_dot_product_attention(q.unflatten(2, (-1, size)), k, v, scale=scale).flatten(2, 3)


def _check(dim: int, heads: int, n_win: int, topk: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"the width {dim} is not divisible by {heads} heads; choose heads that divide it.")
    if n_win < 1:
        raise ValueError(f"n_win is {n_win}; an axis has at least 1 region.")
    if not 1 <= topk <= n_win * n_win:
        raise ValueError(f"topk is {topk}; choose 1 to {n_win * n_win} of the {n_win} x {n_win} regions.")


class QKV(nn.Module):
    """One projection to queries, keys and values; a module of its own because released weights call it ``qkv.qkv``."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, dim=-1)


@register_notrace_module
class BilevelRoutingAttention(nn.Module):
    """[B, H, W, C] -> [B, H, W, C]: attention over chosen regions, plus a depth-wise convolution of the values.

    heads   that divide the width
    n_win   regions per axis; more are smaller and finer chosen
    topk    regions that a region looks at; n_win ** 2 is dense attention
    scale   of the scores; default C ** -0.5
    """

    def __init__(
        self, dim: int, heads: int, n_win: int = 7, topk: int = 4, scale: float | None = None, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        _check(dim, heads, n_win, topk)
        dd = {"device": device, "dtype": dtype}
        self.heads, self.n_win, self.topk = heads, n_win, topk
        self.scale = dim**-0.5 if scale is None else scale
        self.qkv = QKV(dim, **dd)
        self.wo = nn.Linear(dim, dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(NOT_SCRIPTABLE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        out = bilevel_attention(q, k, v, self.heads, self.n_win, self.topk, self.scale)
        return self.wo(out + local(self.lepe, v))


@register_notrace_module
class DenseAttention(nn.Module):
    """The last stage's attention, over all tokens: [B, H, W, C] -> [B, H, W, C], with the same convolution of the values."""

    def __init__(self, dim: int, heads: int = 8, device: Any = None, dtype: Any = None):
        super().__init__()
        _check(dim, heads, 1, 1)
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (_split(t.flatten(1, 2), self.heads) for t in maps)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view_as(maps[2])
        return self.proj(out + local(self.lepe, maps[2]))


def local(convolution: nn.Module, x: Tensor) -> Tensor:
    """A convolution of a map that lies as [B, H, W, C]."""
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
