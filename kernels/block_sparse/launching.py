"""What every kernel call does alike: keys in the plan's order, outputs to fill, and starting a compiled kernel.

* Kernels are started without asking Triton again what to compile. With a hundred arguments, working out the specialisation costs Triton a few hundred microseconds a call, more than many kernels run. Here the
  compiled form is kept with the plan, under a key that says everything a compiler may specialise on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.order import permute_tokens

BIG = 2**31


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


def specialised(integers: Sequence[int], tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """What a compiler may make of integers (1, multiple of 16) and pointers (16-byte aligned); None where an integer needs 64 bits."""
    if any(x >= BIG for x in integers):
        return None
    return (
        *((x == 1) + 2 * (x % 16 == 0) for x in integers),
        *(None if x is None else x.data_ptr() % 16 == 0 for x in tensors),
    )


def launch(kernel: Any, programs: tuple[int, int, int], args: list[Any], switches: dict[str, Any], options: dict[str, int],
           kept: dict[Any, Any], key: tuple[Any, ...] | None, device: torch.device) -> None:  # fmt: skip
    """``kernel[programs](*args, **switches, **options)`` on ``device``; the compiled form is kept in ``kept`` under ``key``."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, args, switches, options, kept, key, device)
    if key is None or device.type != "cuda":
        kernel[programs](*args, **switches, **options)
        return None
    compiled = kept.get(key)
    if compiled is None:
        kept[key] = kernel[programs](*args, **switches, **options)
    else:
        compiled[programs](*args, *(switches[name] for name in kernel.arg_names[len(args) :]))
    return None
