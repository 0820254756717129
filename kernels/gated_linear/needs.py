"""What each implementation of gated and of plain linear attention needs, as data, and the choice that follows from it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.kernels.block_sparse.needs import FLOATS, Needs, name_of

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


@dataclass(frozen=True)
class Choice:
    """The implementation a call takes, and why the preferred ones before it cannot."""

    name: str
    skipped: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.name + "".join(f" ({name} skipped: {why})" for name, why in self.skipped)


def choose(q: Tensor, v: Tensor, implementation: str | None = None) -> Choice:
    """Which implementation takes q [B, H, N, K] with v [B, H, N, V]. ValueError when the one asked for by name cannot."""
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            near = difflib.get_close_matches(implementation, IMPLEMENTATIONS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"there is no implementation {implementation!r}{hint}; choose one of {', '.join(IMPLEMENTATIONS)}."
            )
        why = refusal(implementation, q, v, by_name=True)
        if why:
            raise ValueError(
                f"the {implementation} implementation cannot take this call: {why}; leave implementation out, or change the input."
            )
        return Choice(implementation)
    skipped: list[tuple[str, str]] = []
    for name in IMPLEMENTATIONS:
        why = "chosen only by name" if name == "reference" else refusal(name, q, v)
        if why is None:
            return Choice(name, tuple(skipped))
        skipped.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in skipped)
    raise ValueError(f"no implementation takes q of shape {tuple(q.shape)}: {reasons}.")


def refusal(name: str, q: Tensor, v: Tensor, by_name: bool = False) -> str | None:
    """Why this implementation cannot take q and v, or None."""
    needs = IMPLEMENTATIONS[name]
    low, high = needs.head_dim
    if not low <= v.shape[-1] <= high:
        return f"values are {v.shape[-1]} wide, outside {low} to {high}"
    return needs.refusal(q, by_name)


def support_table() -> str:
    """The implementations and what they need, as a Markdown table."""
    lines = ["| implementation | devices | dtypes | widths | note |", "|---|---|---|---|---|"]
    for name, need in IMPLEMENTATIONS.items():
        devices = ", ".join(need.devices)
        devices += (
            f" (compute capability {need.capability[0]}.{need.capability[1]} and later)" if need.capability else ""
        )
        widths = f"{need.head_dim[0]} to {need.head_dim[1]}" if need.head_dim[1] < 1 << 20 else "any"
        lines.append(f"| `{name}` | {devices} | {', '.join(map(name_of, need.dtypes))} | {widths} | {need.note} |")
    return "\n".join(lines)
