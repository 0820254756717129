"""Multiply-adds of one image through a model, token mixing included.

Letters: B batch, H heads, N queries, M keys, K key width, V value width, S pixels a side.

Notable choices
- Operators that mix tokens are counted by their algorithm, whatever implementation would run: softmax attention N M (K + V) a head,
  block-sparse attention the same over the pairs its plan attends, neighbourhoods with given weights one a weight and channel, gated and
  plain linear attention by the formulas of ``foveal.kernels.gated_linear.counting``. All else (matrix products, convolutions) is what PyTorch's counter sees.
- Additions, norms, activations, gates and pooling are left out, as everybody leaves them out.
- Nothing is computed where a model can run without values; otherwise on the CPU, where operators of ours give zeros.
- Papers often publish less, because their counters do not see custom kernels.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from foveal.kernels import block_sparse, gated_linear
from foveal.kernels.block_sparse import BlockPlan
from foveal.kernels.block_sparse.counting import attended_pairs
from foveal.kernels.gated_linear.counting import multiply_adds as gated
from foveal.kernels.gated_linear.counting import plain_multiply_adds as plain

ROOM = "foveal.vision"


@dataclass
class Count:
    """Multiply-adds: total, and those of operators that mix tokens."""

    total: int = 0
    mixing: int = 0


class SoftmaxCounted(TorchFunctionMode):
    """Softmax attention is counted and gives zeros."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (args[i] if len(args) > i else (kwargs or {})[n] for i, n in enumerate(("query", "key", "value")))
        self.count.mixing += q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return q.new_zeros(*q.shape[:-1], v.shape[-1])


def stand_ins(count: Count) -> dict[Any, Callable[..., Tensor]]:
    """For every operator of ours what takes its place: it counts and gives zeros."""

    def gates(directions: int) -> Callable[..., Tensor]:
        def stand_in(q: Tensor, k: Tensor, v: Tensor, *_: Any, return_state: bool = False, **__: Any) -> Tensor:
            if return_state:
                raise NotImplementedError("a call that returns its state is not counted here.")
            b, h, n, d = q.shape
            count.mixing += gated(b, h, n, d, v.shape[-1], directions=directions)
            return torch.zeros_like(v)

        return stand_in

    def no_order(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        b, h, n, d = q.shape
        count.mixing += plain(b, h, n, d, v.shape[-1])
        return torch.zeros_like(v)

    def sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, return_lse: bool = False, **_: Any) -> Any:
        count.mixing += round(attended_pairs(plan) * q.shape[0] * q.shape[1] * 2 * q.shape[3])
        return (torch.zeros_like(q), q.new_zeros(q.shape[:3])) if return_lse else torch.zeros_like(q)

    def neighbourhood(w: Tensor, v: Tensor) -> Tensor:
        count.mixing += w.numel() * v.shape[-1]
        return torch.zeros_like(v)

    return {
        _neighborhood_mix(): neighbourhood,
        gated_linear.gated_linear_attention: gates(1),
        gated_linear.bidirectional_gated_linear_attention: gates(2),
        gated_linear.linear_attention: no_order,
        block_sparse.block_sparse_attention: sparse,
    }


def _neighborhood_mix() -> Any:
    from foveal.vision import neighborhood_mix  # of a room that needs timm

    return neighborhood_mix


@contextlib.contextmanager
def operators_replaced(count: Count) -> Iterator[None]:
    """In every module of ``foveal.vision`` that is loaded, for as long as this is open."""
    places = stand_ins(count)
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            for attribute, value in list(vars(module).items()) if name.startswith(ROOM) else ():
                if callable(value) and getattr(value, "__hash__", None) and value in places:
                    stack.enter_context(mock.patch.object(module, attribute, places[value]))
        yield


def multiply_adds(build: Callable[[], nn.Module], size: int, channels: int = 3) -> Count:
    """Of one image of S x S through the model that ``build`` makes on the default device. Errors are the model's."""
    try:
        return _count(build, size, channels, "meta")
    except (NotImplementedError, RuntimeError, ValueError, TypeError):  # something asks for values
        return _count(build, size, channels, "cpu")


def _count(build: Callable[[], nn.Module], size: int, channels: int, device: str) -> Count:
    count = Count()
    with torch.device(device):
        model = build().eval()
        image = torch.zeros(1, channels, size, size)
    with operators_replaced(count), SoftmaxCounted(count), FlopCounterMode(display=False) as rest, torch.no_grad():
        model(image)
    count.total = rest.get_total_flops() // 2 + count.mixing
    return count
