"""Scores between blocks from their means.

Letters as in pooling.py; R query blocks, C key blocks, Hkv key heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.selection.pooling import BlockStatistics


def block_scores(
    q: BlockStatistics, k: BlockStatistics, scale: float, *, weighted: bool = False, gaussian: bool = False
) -> Tensor:
    """How much a block of keys matters to a block of queries, in natural-log units. -> fp32 [B, H, R, C]

    ``scale * mean(q) . mean(k)``; weighted: ``+ ln n`` of the keys, the log of the block's mass if all its keys were the mean; gaussian:
    ``+ scale^2 / 2 * sum_d(q_d^2 var_d)``, the same for normally distributed keys (needs k.var). Empty key blocks score -inf.
    """
    if gaussian and k.var is None:
        raise ValueError("gaussian scores need the keys' variance; pool them with variance=True.")
    if on_card(q.mean, k.mean):
        from foveal.kernels.selection.scoring_kernel import scores_of

        return scores_of(q.mean, k.mean, k.var if gaussian else None, k.n, scale, weighted)
    groups = q.mean.shape[1] // k.mean.shape[1]
    mean = k.mean.repeat_interleave(groups, 1) if groups > 1 else k.mean
    scores = torch.matmul(q.mean, mean.mT) * scale
    if gaussian and k.var is not None:
        var = k.var.repeat_interleave(groups, 1) if groups > 1 else k.var
        scores = scores + torch.matmul(q.mean.square(), var.mT) * (0.5 * scale * scale)
    n = k.n.repeat_interleave(groups, 1) if groups > 1 else k.n
    if weighted:
        scores = scores + n.clamp(min=1).log()[:, :, None]
    return scores.masked_fill((n == 0)[:, :, None], -torch.inf)


def on_card(q: Tensor, k: Tensor) -> bool:
    """Whether means are scored by the Triton kernel, which has no backward."""
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return q.is_cuda and q.dtype == k.dtype == torch.float32 and not learns


def block_probabilities(scores: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Softmax over key blocks in fp32. excluded: bool, broadcasts to scores; those get 0. A row without any block is all 0."""
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    return torch.nan_to_num(torch.softmax(scores.float(), dim=-1), nan=0.0)
