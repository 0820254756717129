"""Calling the gated kernels: tensors become pointers and strides, missing directions compile-time switches. Letters as in portable.py.

A kind of call (shapes, strides, dtypes, options) that was seen keeps all its arguments but the pointers: working them out again takes the
host longer than the kernels take the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse.launching import COMPILED_ON, Started, launch
from foveal.kernels.gated_linear.portable import chunk_outputs, chunk_states
from foveal.kernels.gated_linear.portable_backward import chunk_gradients
from foveal.kernels.gated_linear.tiles import Tile, padded, tile_for

Gates = tuple[Tensor | None, Tensor | None]
STATE_VALUES, STATE_WARPS, STATE_STAGES = 64, 4, 3  # of one program that makes states
PROGRAMS = 264  # about two for every multiprocessor of a large GPU: how far states are split


KEPT = 1024  # kinds of calls


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def precisions(dtype: torch.dtype) -> tuple[str, str]:
    """Of products of inputs, and of products with factors and states. One tf32 product cuts fp32 factors off: too coarse for fp16."""
    return {torch.bfloat16: ("ieee", "ieee"), torch.float16: ("ieee", "tf32x3")}.get(dtype, ("tf32x3", "tf32x3"))


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
        return ceil_div(self.q.shape[2], self.tile.C)

    @property
    def heads(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    @property
    def key_tiles(self) -> int:
        return ceil_div(self.q.shape[3], self.tile.BK)

    def both(self, given: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Both gates, or what belongs to them; the missing one lends the other's."""
        pair = self.gates if given is None else given
        spare = next(x for x in pair if x is not None)
        return [spare if x is None else x for x in pair]

    def switches(self) -> dict[str, Any]:
        product, mixed = precisions(self.q.dtype)
        return {
            "H": self.q.shape[1], "N": self.q.shape[2], "M": self.chunks, "heads": self.heads,
            "DK": self.q.shape[3], "DV": self.v.shape[3], "BK": self.tile.BK, "BV": self.tile.BV, "KTILES": self.key_tiles,
            "VTILES": ceil_div(self.v.shape[3], self.tile.BV), "C": self.tile.C, "VECTOR": self.vector,
            "FORWARD": self.gates[0] is not None, "BACKWARD": self.gates[1] is not None, "PRODUCT": product, "MIXED": mixed,
        }  # fmt: skip

    def start(
        self, kernel: Any, programs: int, tensors: list[Tensor], strided: list[Tensor], options: dict[str, int], **switches: Any
    ) -> None:  # fmt: skip
        """strided: the tensors whose strides the kernel takes, in its order."""
        strides = [s for x in strided for s in x.stride()]
        addresses = [x.data_ptr() for x in tensors]
        given = tuple(g is None for g in self.gates)
        seen: list[Started] = []
        if self.q.device.type in COMPILED_ON:
            seen = _seen(
                kernel, self.q.device.index, self.q.shape, self.v.shape[-1], self.vector, given, self.tile, *strides, *switches.values(),
                *(x.dtype for x in tensors), *(x % 16 == 0 for x in addresses),
            )  # fmt: skip
        if seen:
            return seen[0].again(*addresses)
        values = self.switches() | switches
        named = {name: values[name] for name in kernel.arg_names[len(tensors) + len(strides) :]}
        started = launch(kernel, (programs, 1, 1), tensors, strides, named, options, self.q.device)
        if started is not None:
            seen.append(started)


@functools.lru_cache(maxsize=KEPT)
def _seen(*kind: Any) -> list[Started]:
    """Where what starts a kind of call again is kept; empty before its first call."""
    return []


def job_of(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, backward: bool = False, tile: Tile | None = None
) -> Job:
    """``tile`` overrides the tuned tile sizes (for tuning and tests)."""
    found = next(g for g in gates if g is not None)
    vector = found.shape[-1] != 1 or q.shape[-1] == 1
    directions = sum(g is not None for g in gates)
    return Job(q, k, v, gates, scale, tile or tile_for(q.dtype, q.shape[3], v.shape[3], vector, backward, directions))


def forward(job: Job, state: Tensor | None, need_state: bool) -> tuple[Tensor, Tensor | None]:
    """-> (out like v, state after the last token [B, H, K, V] fp32 or None)."""
    entering, last = None, None
    if job.chunks > 1 or state is not None or need_state:
        entering, last = states(job, job.k, job.v, state, need_state, query=False)
    out = torch.empty_like(job.v)
    tensors = [job.q, job.k, job.v, *job.both(), job.q if entering is None else entering, out]
    vtiles = ceil_div(job.v.shape[3], job.tile.BV)
    options = {"num_warps": job.tile.warps, "num_stages": 1}
    job.start(
        chunk_outputs, job.heads * job.chunks * vtiles, tensors, [*tensors[:5], out], options,
        scale=job.scale, HAS_STATES=entering is not None,
    )  # fmt: skip
    return out, last


def state_tile(keys: int, values: int, heads: int) -> tuple[int, int]:
    """Channels of keys and of values that one program makes the states of: few where there are few heads."""
    wide = min(32, padded(keys))
    return (wide if heads * ceil_div(keys, wide) >= PROGRAMS else 16), min(STATE_VALUES, padded(values))


def states(
    job: Job, x: Tensor, y: Tensor, first: Tensor | None, need_last: bool, query: bool
) -> tuple[Tensor, Tensor | None]:
    """-> (states entering the chunks [directions, B H, M, K, V], the first direction's last state or None).

    query: x are queries and y the output's gradient; the states are gradients then, and run the other way.
    """
    width, values = job.q.shape[3], job.v.shape[3]
    kind = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    kept = x.new_empty((job.directions, job.heads, job.chunks, width, values), dtype=kind)
    last = x.new_empty((*x.shape[:2], width, values), dtype=torch.float32) if need_last else None
    BK, BV = state_tile(width, values, job.directions * job.heads)
    ktiles, vtiles = ceil_div(width, BK), ceil_div(values, BV)
    first = None if first is None else first.contiguous()
    tensors = [x, y, *job.both(), kept if first is None else first, kept, kept if last is None else last]
    job.start(
        chunk_states, job.directions * job.heads * ktiles * vtiles, tensors, tensors[:4], {"num_warps": STATE_WARPS, "num_stages": STATE_STAGES},
        scale=job.scale if query else 1.0, BK=BK, BV=BV, KTILES=ktiles, VTILES=vtiles, QUERY=query, HAS_FIRST=first is not None,
        NEED_LAST=need_last, STAGES=STATE_STAGES,
    )  # fmt: skip
    return kept, last


def backward(
    job: Job, d_out: Tensor, state: Tensor | None, d_last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of q, k, v, the two gates and the initial state. States are made again."""
    entering, grads, d_state = None, None, None
    if job.chunks > 1 or state is not None or d_last is not None:
        entering, _ = states(job, job.k, job.v, state, False, query=False)
        grads, d_state = states(job, job.q, d_out, d_last, state is not None, query=True)
    tiles = job.key_tiles
    dq, dk = torch.empty_like(job.q), torch.empty_like(job.k)
    dv = _shares(job.v, tiles)
    d_gates = [None if g is None else _shares(g, 1 if job.vector else tiles) for g in job.gates]
    both = [d.expand(tiles, *d.shape[1:]) for d in job.both(d_gates)]
    inputs = [job.q, job.k, job.v, d_out, *job.both()]
    spare = job.q if entering is None else entering
    tensors = [*inputs, spare, spare if grads is None else grads, dq, dk, dv, *both]
    options = {"num_warps": job.tile.warps, "num_stages": 1}
    job.start(
        chunk_gradients, job.heads * job.chunks * tiles, tensors, [*inputs, dq, dk, dv, *both], options,
        scale=job.scale, HAS_STATES=entering is not None,
    )  # fmt: skip
    forward_gate, backward_gate = (
        None if d is None or g is None else _total(d, g) for d, g in zip(d_gates, job.gates, strict=True)
    )
    return dq, dk, _total(dv, job.v), forward_gate, backward_gate, d_state


def _shares(x: Tensor, tiles: int) -> Tensor:
    """Memory for the gradient of x, or for the shares that key tiles have in it [tiles, ...]."""
    return torch.empty_like(x)[None] if tiles == 1 else x.new_empty((tiles, *x.shape), dtype=torch.float32)


def _total(shares: Tensor, x: Tensor) -> Tensor:
    """With x's dtype and strides."""
    return shares[0] if shares.shape[0] == 1 else torch.empty_like(x).copy_(shares.sum(0))
