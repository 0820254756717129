"""From kept blocks to the lists of a plan, without waiting for the device.

Letters as in scoring.py; K list width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.kernels.selection.keeping import PrefixRule, keep_top_k, keep_top_p, on_card


@dataclass(frozen=True)
class BlockLists:
    """count int32 [B, H, R] and index int32 [B, H, R, K], as a plan takes them; unused slots hold 0."""

    count: Tensor
    index: Tensor


def block_lists(keep: Tensor, *, width: int | None = None, scores: Tensor | None = None) -> BlockLists:
    """Lists of the kept blocks.

    keep    bool [B, H, R, C]
    width   K, a host number; default C, so that nothing is cut. A row that keeps more than K is an error of the caller: with scores its
            worst blocks are dropped, without them its last ones
    scores  fp32, shape of keep: lists in priority order, best first; without them in address order
    """
    c = keep.shape[-1]
    width = c if width is None else min(width, c)
    if scores is not None:
        ranked = torch.where(keep, scores.float(), -torch.inf)
        order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :width]
        count = keep.sum(-1, dtype=torch.int32).clamp(max=width)
        live = torch.arange(width, device=keep.device) < count[..., None]
        return BlockLists(count, torch.where(live, order, 0).to(torch.int32))
    if keep.is_cuda:
        from foveal.kernels.selection.portable import compact

        return BlockLists(*compact(keep, width))
    place = keep.cumsum(-1) - 1
    slot = torch.where(keep & (place < width), place, width)
    index = torch.zeros(*keep.shape[:-1], width + 1, dtype=torch.int32, device=keep.device)
    index.scatter_(-1, slot, torch.arange(c, dtype=torch.int32, device=keep.device).expand_as(keep))
    return BlockLists(keep.sum(-1, dtype=torch.int32).clamp(max=width), index[..., :width].contiguous())


def top_k_lists(scores: Tensor, k: int | Tensor, *, width: int | None = None) -> BlockLists:
    """``block_lists(keep_top_k(scores, k), width=width)``, on a GPU in one pass over scores. width: default k where it is a number, else C."""
    c = scores.shape[-1]
    width = min(c, width if width is not None else k if isinstance(k, int) else c)
    if on_card(scores) and not (isinstance(k, int) and k < 1):
        from foveal.kernels.selection.bisection import list_best

        return BlockLists(*list_best(scores, k, width))
    return block_lists(keep_top_k(scores, k), width=width)


def top_p_lists(
    probabilities: Tensor, p: float | Tensor, *, rule: PrefixRule = "cross", least: int = 1, width: int | None = None
) -> BlockLists:
    """``block_lists(keep_top_p(probabilities, p, rule=rule, least=least), width=width)``, on a GPU in one pass over probabilities."""
    width = min(probabilities.shape[-1], probabilities.shape[-1] if width is None else width)
    if on_card(probabilities) and (isinstance(p, Tensor) or 0 < p <= 1):
        from foveal.kernels.selection.bisection import list_best

        return BlockLists(*list_best(probabilities, p, width, mass=True, under=rule == "under", least=least))
    return block_lists(keep_top_p(probabilities, p, rule=rule, least=least), width=width)
