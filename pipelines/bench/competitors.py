"""Who is measured beside our kernels: SDPA's backends, padded and not, FlexAttention, and other packages where they are installed.

Letters: B batch, H heads, N tokens, D head dim; R query blocks, C key blocks.

Notable choices
- Padded rows leave out the mask that padding would need: a lower bound of what it takes, so that no baseline is made slow.
- Only SDPA's rows can be the baseline: every PyTorch has them.
- On a GPU the "math" backend is left out: it writes all N x N scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from foveal.kernels.block_sparse import BlockPlan, KernelOptions, block_sparse_attention
from foveal.kernels.block_sparse.needs import IMPLEMENTATIONS
from foveal.pipelines.bench import peers

Call = Callable[[], Tensor]
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PAD = 128
PADDED = "-padded"


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def is_sdpa(name: str) -> bool:
    """Whether a competitor is a backend of SDPA, and so may be the baseline."""
    return name.removesuffix(PADDED) in BACKENDS


def dense(q: Tensor, k: Tensor, v: Tensor, everybody: bool = False) -> dict[str, Call]:
    """Dense competitors, by name. ``everybody``: also those that are slower by far on a GPU, all of them padded too, and xformers."""
    if q.is_cuda:
        names, padded = (("cudnn", "flash2", "efficient") if everybody else ("cudnn", "flash2")), ["cudnn"]
    else:
        names, padded = ("flash2", "math"), []
    if everybody:
        padded = list(names)
    calls = {n: sdpa(BACKENDS[n], q, k, v) for n in names}
    if q.shape[2] % PAD:
        more = [F.pad(x, (0, 0, 0, -x.shape[2] % PAD)) for x in (q, k, v)]
        calls |= {n + PADDED: sdpa(BACKENDS[n], *more) for n in padded}
    if q.is_cuda:
        calls |= peers.flash4(q, k, v) | (peers.xformers(q, k, v) if everybody else {})
    return calls


def ours(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> dict[str, Call]:
    """Our implementations that take these tensors, by name."""
    found: dict[str, Call] = {}
    for name, needs in IMPLEMENTATIONS.items():
        slow = name == "reference" or (name == "torch" and q.is_cuda)
        if slow or needs.refusal(q) or needs.call_refusal(q, plan, k, v):
            continue
        found[name] = _ours(name, q, k, v, plan)
    return found


def _ours(name: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Call:
    options = KernelOptions(implementation=name)
    return lambda: block_sparse_attention(q, k, v, plan, options=options)


def sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, with_flex: bool = False) -> dict[str, Call]:
    """Everybody who can run this plan: ours, flash-attn-4 and, on a GPU, FlexAttention."""
    calls = ours(q, k, v, plan)
    if q.is_cuda:
        calls |= peers.flash4_sparse(q, k, v, plan) | ({"flex": flex(q, k, v, plan)} if with_flex else {})
    return calls


def flex(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Call:
    """FlexAttention, compiled, on the same lists and masks; blocks of the plan must be uniform. Made ready at its first call."""
    ready: list[Call] = []

    def call() -> Tensor:
        if not ready:
            ready.append(_flex(q, k, v, plan))
        return ready[0]()

    return call


def _flex(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    from foveal.plugins.plans.block_mask import to_block_mask

    mask = to_block_mask(plan) if plan.box is not None else full_blocks(plan, q.shape[0], q.shape[1])
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def full_blocks(plan: BlockPlan, batch: int, heads: int) -> BlockMask:
    """The lists of a plan without masks, and no mask function that could cost time."""
    count = plan.count.expand(batch, heads, -1).contiguous()
    index = count.new_zeros(*count.shape, plan.n_kv_blocks)
    index[..., : plan.index.shape[-1]] = plan.index
    sizes = (plan.max_q_len, plan.max_kv_len)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(index), count, index, BLOCK_SIZE=sizes, seq_lengths=(plan.n_queries, plan.n_keys)
    )  # fmt: skip
