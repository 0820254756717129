"""What a call must look like, said in one sentence when it does not."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensors(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k [B, H, N, K] and v [B, H, N, V] of one floating dtype on one device."""
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x.layout != torch.strided or x.is_nested:
            raise ValueError(f"{label} is {x.layout} or nested; {name} needs plain strided tensors.")
        if x.ndim != 4:
            raise ValueError(f"{label} has shape {tuple(x.shape)}; [batch, heads, tokens, width] is needed.")
        if not x.is_floating_point():
            raise TypeError(f"{label} is {x.dtype}; {name} needs floating-point tensors.")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{label} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; give all three one dtype and device."
            )
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: k needs q's shape, v the same batch, heads and "
            "tokens; repeat grouped heads first."
        )


def check_gate(name: str, gate: Tensor, q: Tensor) -> Tensor:
    """-> the gate as [B, H, N, K] or [B, H, N, 1]"""
    if gate.shape != q.shape and gate.shape != q.shape[:3]:
        raise ValueError(
            f"{name} has shape {tuple(gate.shape)}; {tuple(q.shape)} (a gate per key channel) or {tuple(q.shape[:3])} (one per head) is needed."
        )
    if not gate.is_floating_point() or gate.device != q.device:
        raise ValueError(f"{name} is {gate.dtype} on {gate.device}; a floating-point log gate on {q.device} is needed.")
    return gate if gate.ndim == 4 else gate[..., None]


def check_state(state: Tensor | None, q: Tensor, v: Tensor) -> None:
    if state is None:
        return
    shape, dtype = (*q.shape[:2], q.shape[3], v.shape[3]), torch.promote_types(q.dtype, torch.float32)
    if state.shape != shape or state.dtype != dtype or state.device != q.device:
        raise ValueError(
            f"the state is {tuple(state.shape)} {state.dtype} on {state.device}; {shape} {dtype} on {q.device} is needed."
        )


def check_values(name: str, gate: Tensor) -> None:
    """Reads the gate (waits for the device): log gates are at most 0, and not NaN."""
    bad = int((~(gate <= 0)).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} of {gate.numel()} entries above 0 or NaN; a log gate is at most 0, e.g. F.logsigmoid(x) / 16."
        )
