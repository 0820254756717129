"""Rules that keep some key blocks of every row. All are pure functions of scores or probabilities, on the device.

On a GPU a kernel finds the weakest block that is kept (bisection.py); elsewhere, and for rows too wide for it, a stable sort does.
Letters as in scoring.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

WIDEST = 16384  # blocks of a row that one program of the Triton kernel holds
PrefixRule = Literal["cross", "under"]


def keep_top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """The k best blocks of every row; of equal ones the earlier. -> bool, shape of scores

    k: a number, or int [B or 1, H or 1, R or 1] for a budget per head or row; at least 1 is kept, and blocks of score -inf never are.
    """
    if isinstance(k, int):
        if k < 1:
            raise ValueError(f"k is {k}; every row keeps at least one block.")
        k = min(k, scores.shape[-1])
    if on_card(scores):
        from foveal.kernels.selection.bisection import keep_best

        return keep_best(scores, k)
    rank = ranks(scores)
    limit = k if isinstance(k, int) else k.clamp(min=1)[..., None]
    return (rank < limit) & (scores > -torch.inf)


def keep_top_p(probabilities: Tensor, p: float | Tensor, *, rule: PrefixRule = "cross", least: int = 1) -> Tensor:
    """The smallest set of best blocks whose mass reaches p. -> bool, shape of probabilities

    rule    "cross" keeps the block that crosses p (prefix_cross); "under" keeps only prefixes of mass <= p (prefix_under)
    p       in (0, 1], a number or [B or 1, H or 1, 1]; p = 1 keeps every block that has mass
    least   blocks kept in any case, at least 1
    """
    if isinstance(p, (int, float)) and not 0 < p <= 1:
        raise ValueError(f"p is {p}; the mass to keep lies in (0, 1].")
    if on_card(probabilities):
        from foveal.kernels.selection.bisection import keep_best

        return keep_best(probabilities, p, mass=True, under=rule == "under", least=least)
    mass, index = torch.sort(probabilities.float(), dim=-1, descending=True, stable=True)
    up_to = mass.cumsum(-1)
    limit = p[..., None] if isinstance(p, Tensor) else p
    # A sum of fp32 masses may miss 1 by rounding: p = 1 means everything that has mass.
    kept = (up_to - mass < limit) if rule == "cross" else (up_to <= limit)
    kept = kept | (limit >= 1)
    kept = (kept | (torch.arange(mass.shape[-1], device=mass.device) < max(1, least))) & (mass > 0)
    return torch.zeros_like(kept).scatter_(-1, index, kept)


def on_card(x: Tensor) -> bool:
    """Whether rows of x [B, H, R, C] are kept by the Triton kernel."""
    fits = x.ndim == 4 and 0 < x.shape[-1] <= WIDEST
    return fits and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def ranks(scores: Tensor) -> Tensor:
    """Place of every block in its row, best first, earlier block first among equals. -> int64, shape of scores"""
    index = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(index)
    return torch.empty_like(index).scatter_(-1, index, places)
