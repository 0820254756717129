"""Who is measured beside our kernels: every SDPA backend, padded and not, FlexAttention, and flash-attn-4 where it is installed.

Letters: B batch, H heads, N tokens, D head dim; R query blocks, C key blocks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.kernels.block_sparse import BlockPlan, KernelOptions, block_sparse_attention
from foveal.kernels.block_sparse.needs import IMPLEMENTATIONS

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PAD = 128


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def dense(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every dense competitor that this device may run. Padded rows leave out the mask they would need: a lower bound."""
    names = ("cudnn", "flash2") if q.is_cuda else ("flash2", "math")
    calls = {n: sdpa(BACKENDS[n], q, k, v) for n in names}
    if q.is_cuda and q.shape[2] % PAD:
        padded = [F.pad(x, (0, 0, 0, -x.shape[2] % PAD)) for x in (q, k, v)]
        calls["cudnn-padded"] = sdpa(SDPBackend.CUDNN_ATTENTION, *padded)
    if (flash4 := flash_attention_4()) is not None and q.is_cuda:
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        calls["flash4"] = lambda: flash4(*rows)
    return calls


def flash_attention_4() -> Callable[..., Any] | None:
    """The dense forward of flash-attn-4 on [B, N, H, D], or None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return None
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


def ours(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> dict[str, Callable[[], Tensor]]:
    """Our implementations that take these tensors, by name."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, needs in IMPLEMENTATIONS.items():
        slow = name == "reference" or (name == "torch" and q.is_cuda)
        if slow or needs.refusal(q) or needs.call_refusal(q, plan, k, v):
            continue
        found[name] = _ours(name, q, k, v, plan)
    return found


def _ours(name: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    options = KernelOptions(implementation=name)
    return lambda: block_sparse_attention(q, k, v, plan, options=options)


def flex(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    """FlexAttention, compiled, on the same lists; blocks of the plan must all have one size, 128."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    count = plan.count.expand(q.shape[0], q.shape[1], -1).contiguous()
    index = plan.index.expand(q.shape[0], q.shape[1], -1, -1).contiguous()
    width = torch.zeros(*index.shape[:3], plan.n_kv_blocks, dtype=torch.int32, device=q.device)
    width[..., : index.shape[-1]] = index
    none = torch.zeros_like(count)
    mask = BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(width),
        count,
        width,
        BLOCK_SIZE=(plan.max_q_len, plan.max_kv_len),
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)
