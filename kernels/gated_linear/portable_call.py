"""Calling the gated kernels: tensors become pointers and strides, missing directions compile-time switches. Letters as in portable.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from foveal.kernels.gated_linear.portable import chunk_apply, chunk_sums, scan_states
from foveal.kernels.gated_linear.portable_backward import chunk_gradients
from foveal.kernels.gated_linear.tiles import Tile, padded, tile_for

SCAN_KEYS, SCAN_VALUES, SCAN_STAGES = 16, 64, 4
GRADIENT_VALUES = 32  # value channels in registers at a time, in the kernel of the gradients
Gates = tuple[Tensor | None, Tensor | None]


def precisions(dtype: torch.dtype) -> tuple[str, str]:
    """Of products of inputs, and of products with states."""
    if dtype == torch.float32:
        return "tf32x3", "tf32x3"
    return "ieee", "tf32" if dtype == torch.float16 else "ieee"


@dataclass(frozen=True)
class Job:
    """What every launch of one call shares."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    scale: float
    tile: Tile

    @property
    def directions(self) -> int:
        return sum(g is not None for g in self.gates)

    @property
    def gate(self) -> Tensor:
        found = self.gates[0] if self.gates[0] is not None else self.gates[1]
        assert found is not None
        return found

    @property
    def vector(self) -> bool:
        return self.gate.shape[-1] != 1 or self.q.shape[-1] == 1

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.q.shape[2], self.tile.C)

    @property
    def heads(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    @property
    def key_tiles(self) -> int:
        return triton.cdiv(self.q.shape[3], self.tile.BK)

    @property
    def mixed_precision(self) -> str:
        """Of products with states, see portable.py."""
        return precisions(self.q.dtype)[1]

    def gate_arguments(self) -> tuple[list[Tensor], list[int]]:
        """Pointers and strides of both gates; the missing one lends the other's."""
        both = [self.gate if g is None else g for g in self.gates]
        return both, [s for g in both for s in g.stride()]

    def switches(self) -> dict[str, Any]:
        return {
            "DK": self.q.shape[3], "DV": self.v.shape[3], "BK": self.tile.BK, "KTILES": self.key_tiles,
            "C": self.tile.C, "VECTOR": self.vector, "FORWARD": self.gates[0] is not None, "BACKWARD": self.gates[1] is not None, "PRODUCT": precisions(self.q.dtype)[0],
            "num_warps": self.tile.warps, "num_stages": 1,
        }  # fmt: skip

    def sizes(self) -> tuple[int, int, int, int]:
        """H, N, M, lead"""
        return self.q.shape[1], self.q.shape[2], self.chunks, self.heads * self.chunks


def job_of(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, backward: bool = False, tile: Tile | None = None
) -> Job:
    """``tile`` overrides the tuned tile sizes (for tuning and tests)."""
    found = next(g for g in gates if g is not None)
    vector = found.shape[-1] != 1 or q.shape[-1] == 1
    return Job(q, k, v, gates, scale, tile or tile_for(q.element_size(), q.shape[3], v.shape[3], vector, backward))


def forward(job: Job, state: Tensor | None, need_state: bool) -> tuple[Tensor, Tensor | None]:
    """-> (out like v, state after the last token [B, H, K, V] fp32 or None)."""
    out = torch.empty_like(job.v)
    entering, last = None, None
    if job.chunks > 1 or state is not None or need_state:
        kept = torch.bfloat16 if job.q.dtype == torch.bfloat16 else torch.float32
        entering, last = states(job, job.k, job.v, state, need_state, kept, query=False)
    apply(job, job.v, entering, out, transposed=False)
    return out, last


def states(
    job: Job, x: Tensor, y: Tensor, first: Tensor | None, need_last: bool, dtype: torch.dtype, query: bool
) -> tuple[Tensor, Tensor | None]:
    """-> (states entering the chunks [directions, B H, M, K, V], the first direction's last state or None).

    query: x are queries and y the output's gradient; the states are gradients then, and run the other way.
    """
    width, values, m = job.q.shape[3], job.v.shape[3], job.chunks
    shape, device = (job.directions, job.heads, m), x.device
    sums = torch.empty(*shape, width, values, dtype=dtype, device=device)
    keep = torch.empty(*shape, width if job.vector else 1, dtype=torch.float32, device=device)
    gates, strides = job.gate_arguments()
    chunk_sums[(job.heads * m * job.key_tiles,)](
        x, y, *gates, sums, keep, *x.stride(), *y.stride(), *strides, job.scale if query else 1.0, *job.sizes(),
        VP=padded(values), QUERY=query, **job.switches(),
    )  # fmt: skip
    last = torch.empty(*job.q.shape[:2], width, values, dtype=torch.float32, device=device) if need_last else None
    BV = min(SCAN_VALUES, padded(values))
    rtiles, vtiles = triton.cdiv(width, SCAN_KEYS), triton.cdiv(values, BV)
    first = None if first is None else first.contiguous()
    scan_states[(rtiles * vtiles * job.heads * job.directions,)](
        sums, keep, sums if first is None else first, sums if last is None else last, m, job.heads,
        DK=width, DV=values, BR=SCAN_KEYS, BV=BV, RTILES=rtiles, VTILES=vtiles, VECTOR=job.vector,
        REVERSE=(job.gates[0] is None) != query, HAS_FIRST=first is not None, NEED_LAST=need_last, STAGES=SCAN_STAGES,
        num_warps=4, num_stages=SCAN_STAGES,
    )  # fmt: skip
    return sums, last


def apply(job: Job, y: Tensor, entering: Tensor | None, out: Tensor, transposed: bool) -> None:
    gates, strides = job.gate_arguments()
    chunk_apply[(job.heads * job.chunks,)](
        job.q, job.k, y, *gates, job.q if entering is None else entering, out,
        *job.q.stride(), *job.k.stride(), *y.stride(), *strides, *out.stride(), job.scale, *job.sizes(),
        VP=padded(job.v.shape[3]), LEVELS=job.tile.levels, HAS_STATES=entering is not None, TRANSPOSED=transposed, MIXED=job.mixed_precision, **job.switches(),
    )  # fmt: skip


def backward(
    job: Job, d_out: Tensor, state: Tensor | None, d_last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of q, k, v, the two gates and the initial state. States are made again, in fp32."""
    entering, grads, d_state = None, None, None
    if job.chunks > 1 or state is not None or d_last is not None:
        entering, _ = states(job, job.k, job.v, state, False, torch.float32, query=False)
        grads, d_state = states(job, job.q, d_out, d_last, state is not None, torch.float32, query=True)
    dq, dk, dv = torch.empty_like(job.q), torch.empty_like(job.k), torch.empty_like(job.v)
    apply(job, d_out, _mixed(grads, job), dv, transposed=True)
    b, h, n, width = job.q.shape
    shape = (b, h, n, width) if job.vector else (job.key_tiles, b, h, n)
    d_gates = [None if g is None else torch.empty(shape, dtype=torch.float32, device=g.device) for g in job.gates]
    gates, strides = job.gate_arguments()
    spare = next(g for g in d_gates if g is not None)
    chunk_gradients[(job.heads * job.chunks * job.key_tiles,)](
        job.q, job.k, job.v, d_out, *gates, job.q if entering is None else entering, job.q if grads is None else grads, dq, dk,
        *(spare if g is None else g for g in d_gates),
        *job.q.stride(), *job.k.stride(), *job.v.stride(), *d_out.stride(), *strides, *dq.stride(), *dk.stride(), job.scale, *job.sizes(),
        BV=min(GRADIENT_VALUES, padded(job.v.shape[3])), LEVELS=job.tile.levels, HAS_STATES=entering is not None,
        MIXED=job.mixed_precision, **job.switches(),
    )  # fmt: skip
    forward_gate, backward_gate = (_as_gate(d, g, job.vector) for d, g in zip(d_gates, job.gates, strict=True))
    return dq, dk, dv, forward_gate, backward_gate, d_state


def _mixed(grads: Tensor | None, job: Job) -> Tensor | None:
    """The states' gradients as an operand of a product with values' gradients."""
    return grads.to(torch.bfloat16) if grads is not None and job.q.dtype == torch.bfloat16 else grads


def _as_gate(grad: Tensor | None, gate: Tensor | None, vector: bool) -> Tensor | None:
    if grad is None or gate is None:
        return None
    return (grad if vector else grad.sum(0)[..., None]).to(gate.dtype)
