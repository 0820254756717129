"""Kernels of other packages, measured where they are installed: flash-attn-4, xformers, fla. None of them is needed.

Letters: B batch, H heads, N tokens, D head dim; R query blocks, K list width. All take [B, H, N, D] here and give [B, H, N, D].

Notable choices
- A package is looked for without importing it and imported at the first call: one that is installed and does not load on this machine
  is a row that failed with its reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan

Call = Callable[[], Tensor]


def installed(package: str, part: str = "") -> bool:
    """Whether a package (with a folder or file ``part`` in it) can be found. Nothing is imported."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    return spec is not None and (not part or any((p / part).exists() for p in places))


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """[B, H, N, D] -> [B, N, H, D], a view."""
    return [x.transpose(1, 2) for x in tensors]


def first(out: Any) -> Tensor:
    """The output of a kernel that may give more, [B, N, H, D] -> [B, H, N, D]."""
    got: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return got.transpose(1, 2)


# ---- softmax attention
def flash4(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """flash-attn-4, dense."""
    if not installed("flash_attn", "cute"):
        return {}

    def call() -> Tensor:
        from flash_attn.cute import flash_attn_func

        return first(flash_attn_func(*rows_of(q, k, v)))

    return {"flash4": call}


def flash4_sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> dict[str, Call]:
    """flash-attn-4 on the same lists, counts of any kind. Its tiles become the plan's blocks: 128 queries by 128 or 64 keys."""
    if not installed("flash_attn", "cute") or not plainly_listed(plan):
        return {}
    count, index = plan.count, by_address(plan)
    none, nothing = torch.zeros_like(count), torch.zeros_like(index[..., :1])

    def call() -> Tensor:
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        # Entries that need a mask function come first in its tuple, whole blocks after them; a batch or head dimension of 1 is shared.
        blocks = (plan.max_q_len, plan.max_kv_len)
        lists = BlockSparseTensorsTorch(
            mask_block_cnt=none, mask_block_idx=nothing, full_block_cnt=count, full_block_idx=index, block_size=blocks
        )
        scale = q.shape[-1] ** -0.5
        return first(flash_attn_func(*rows_of(q, k, v), softmax_scale=scale, block_sparse_tensors=lists))

    return {"flash4-sparse": call}


def plainly_listed(plan: BlockPlan) -> bool:
    """Whether lists say all of a plan, and blocks are equal runs from position 0 on, the last one cut by the sequence."""
    extras = (plan.box, plan.row_bits, plan.block_bias, plan.key_bias, plan.proxies)
    orders = () if plan.ordered else (plan.q_order, plan.kv_order)
    if plan.dense_rows or any(x is not None for x in (*extras, *orders)):
        return False
    sides = (plan.q_start, plan.q_len, plan.n_queries), (plan.kv_start, plan.kv_len, plan.n_keys)
    return all(equal_runs(*side) for side in sides)


def equal_runs(start: Tensor, length: Tensor, tokens: int) -> bool:
    n, size = start.shape[-1], int(length.max()) if length.numel() else 0
    if n == 0 or n != -(-tokens // max(1, size)):
        return False
    want = torch.arange(n, device=start.device) * size
    return bool((start == want).all() and (length == (tokens - want).clamp(max=size)).all())


def by_address(plan: BlockPlan) -> Tensor:
    """The lists in address order: flash-attn-4 hides what lies past the sequence in the last listed block only. int32 [Bm, Hm, R, K]"""
    if plan.list_order == "address":
        return plan.index
    listed = torch.arange(plan.index.shape[-1], device=plan.device) < plan.count[..., None]
    last = plan.n_kv_blocks - 1
    return torch.where(listed, plan.index, last + 1).sort(-1).values.clamp(max=last).int()


def xformers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """xformers' memory-efficient attention, dense."""
    if not installed("xformers"):
        return {}

    def call() -> Tensor:
        from xformers.ops import memory_efficient_attention

        return first(memory_efficient_attention(*rows_of(q, k, v)))

    return {"xformers": call}


# ---- linear attention
def fla(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> dict[str, Call]:
    """fla's chunked kernels: ``chunk_gla`` for gates [B, H, N, D], ``chunk_simple_gla`` for gates [B, H, N]."""
    if not installed("fla"):
        return {}
    vector = log_gate.ndim == 4

    def call() -> Tensor:
        if vector:
            from fla.ops.gla import chunk_gla as kernel
        else:
            from fla.ops.simple_gla import chunk_simple_gla as kernel
        return first(kernel(*rows_of(q, k, v, log_gate)))

    return {"fla chunk_gla" if vector else "fla chunk_simple_gla": call}
