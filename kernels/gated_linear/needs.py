"""What each implementation of gated and of plain linear attention needs, as data, and the choice that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.block_sparse import needs as common
from foveal.kernels.block_sparse.needs import FLOATS, Needs
from foveal.kernels.choosing import Choice, pick

WIDTHS = (1, 128)  # of keys and of values, in the Triton kernels
# In order of preference.
IMPLEMENTATIONS: dict[str, Needs] = {
    "triton": Needs(
        devices=("cuda",), dtypes=FLOATS, head_dim=WIDTHS, capability=(8, 0), requires="triton",
        note="forward and backward, fits 99 KB of shared memory",
    ),
    "torch": Needs(
        devices=("any",), dtypes=(*FLOATS, torch.float64), head_dim=(1, 1 << 30),
        note="chunks as matrix products, differentiated by PyTorch",
    ),
    "reference": Needs(
        devices=("any",), dtypes=(*FLOATS, torch.float64), head_dim=(1, 1 << 30),
        note="the definition, one token after the other (gated) or every pair (plain): the oracle, chosen only by name",
    ),
}  # fmt: skip


def choose(q: Tensor, v: Tensor, implementation: str | None = None) -> Choice:
    """Which implementation takes q [B, H, N, K] with v [B, H, N, V]. ValueError when the one asked for by name cannot."""
    by_name = implementation is not None
    return pick(IMPLEMENTATIONS, implementation, tuple(q.shape), lambda name: refusal(name, q, v, by_name))


def refusal(name: str, q: Tensor, v: Tensor, by_name: bool = False) -> str | None:
    """Why this implementation cannot take q and v, or None."""
    needs = IMPLEMENTATIONS[name]
    low, high = needs.head_dim
    if not low <= v.shape[-1] <= high:
        return f"values are {v.shape[-1]} wide, outside {low} to {high}"
    return needs.refusal(q, by_name)


def support_table() -> str:
    """The implementations and what they need, as a Markdown table."""
    return common.support_table(IMPLEMENTATIONS, "widths")
