"""What every kernel call does alike: keys in the plan's order, outputs to fill, and starting a compiled kernel.

* With a hundred arguments, working out what to compile costs Triton a few hundred microseconds a call, more than many kernels run. So a compiled
  kernel is kept under what its compiler may specialise on, and a kind of call that a plan has seen keeps all arguments that do not change.
* Pointers go to the kernel as integers: for a tensor, the launcher would ask the driver where it lies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.order import permute_tokens

BIG = 2**31
KEPT = 1024  # compiled kernels
COMPILED_ON = ("cuda",)


def keys_in_order(k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """k and v in the plan's order, copied where the caller's are not."""
    if plan.ordered or plan.kv_order is None:
        return k, v
    return permute_tokens(k, plan.kv_order), permute_tokens(v, plan.kv_order)


def empty_outputs(q: Tensor, plan: BlockPlan, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out with q's strides and lse fp32 [B, H, N], holding what a query without a block has (0 and -inf) unless every query has one."""
    covered = bool(plan.covers and plan.n_q_blocks and plan.max_q_len)
    out = torch.empty_like(q) if covered else torch.zeros_like(q)
    if not need_lse:
        return out, None
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return out, lse if covered else lse.fill_(-torch.inf)


class PlanArguments(NamedTuple):
    """What a plan gives a kernel, worked out once: pointers, strides, sizes and compile-time switches."""

    pointers: tuple[Tensor, ...]
    strides: tuple[int, ...]
    sizes: dict[str, int]
    switches: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Started:
    """A compiled kernel on its grid, and the arguments that every call of this kind shares. held: tensors behind pointers in ``fixed``."""

    run: Any
    fixed: tuple[Any, ...]
    device: int
    held: tuple[Tensor, ...]

    def again(self, *moving: Any) -> None:
        """Start it with other first arguments, alike in type, strides and alignment; pointers are integers."""
        if self.device != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.run(*moving, *self.fixed)
        return self.run(*moving, *self.fixed)


def launch(
    kernel: Any, programs: tuple[int, int, int], moving: Sequence[Any], fixed: Sequence[Any], switches: dict[str, Any],
    options: dict[str, int], device: torch.device,
) -> Started | None:  # fmt: skip
    """``kernel[programs](*moving, *fixed, **switches, **options)`` on ``device``. -> what starts it again, where kernels are compiled"""
    if device.type not in COMPILED_ON:
        kernel[programs](*moving, *fixed, **switches, **options)
        return None
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, moving, fixed, switches, options, device)
    args = (*moving, *fixed, *[switches[name] for name in kernel.arg_names[len(moving) + len(fixed) :]])
    place = _place(kernel, device.index, facts(kernel, args), tuple(options.items()))
    numbers = [x.data_ptr() if isinstance(x, Tensor) else x for x in args]
    if place:
        place[0][programs](*numbers)
    else:
        place.append(kernel[programs](*moving, *fixed, **switches, **options))
    held = tuple(x for x in fixed if isinstance(x, Tensor))
    return Started(place[0][programs], tuple(numbers[len(moving) :]), device.index, held)


def facts(kernel: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a compiler may make of arguments: values of constants, factors of integers, types and alignment of pointers, 32 or 64 bits."""
    constants, numbers, values = _parameters(kernel)
    return constants(args), max(numbers(args)) < BIG, tuple(map(form, values(args)))


def form(x: Any) -> Any:
    """What a compiler may make of one argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return (x == 1) + 2 * (x % 16 == 0) + 4 * (x >= BIG)
    return x.base.dtype, *x.block_shape  # a table of rows for TMA


@functools.lru_cache(maxsize=16)
def _parameters(kernel: Any) -> tuple[Callable[..., Any], ...]:
    """What picks the constants, the numbers that are not specialised and all other arguments."""
    kinds = [0 if p.is_constexpr else 1 if p.do_not_specialize else 2 for p in kernel.params]
    return tuple(itemgetter(*(i for i, kind in enumerate(kinds) if kind == wanted)) for wanted in range(3))


@functools.lru_cache(maxsize=KEPT)
def _place(kernel: Any, device: int, facts: tuple[Any, ...], options: tuple[Any, ...]) -> list[Any]:
    """Where the compiled kernel of these facts is kept; empty before it is compiled."""
    return []
