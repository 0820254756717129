"""How the Triton kernels of linear attention without order are started: widths, tiles, parts of the tokens. Letters as in plain_kernels.py.

Notable choices
- What Triton compiles is asked once for each kind of call (widths, lengths, strides, dtypes) and kept: asking at every call takes the host
  longer than these kernels take the GPU.
- Programs of the sums come one to a multiprocessor, with several tiles on their way, those of ``attend`` two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gated_linear.plain_kernels import attend, join_parts, token_sums
from foveal.kernels.gated_linear.portable_call import precisions
from foveal.kernels.gated_linear.tiles import padded

PROGRAMS = 132  # multiprocessors of a large GPU
TILES = 16  # of queries, at most, for each program of a long sequence
JOINED = {"BLOCK": 512, "BP": 8, "num_warps": 4, "num_stages": 1}


@dataclass(frozen=True)
class Shape:
    """Widths and tiles of a kernel. keys: their padded width; values: channels of a tile; tokens: of a tile; stages: tiles on their way."""

    keys: int
    values: int
    tokens: int
    warps: int
    stages: int = 2

    def switches(self, keys: int, values: int, dtype: torch.dtype) -> dict[str, Any]:
        kind, product = kinds(dtype)
        return {
            "DK": keys, "DV": values, "KP": self.keys, "BV": self.values, "BN": self.tokens, "KIND": kind, "PRODUCT": product,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


def shape_of(keys: int, values: int, dtype: torch.dtype) -> Shape:
    """Of the gradients, and of all kernels but for bf16."""
    large = max(padded(keys), padded(values)) > 64 or dtype.itemsize == 4
    tile = min(padded(values), 32 if dtype.itemsize == 4 else 64)
    return Shape(padded(keys), tile, 32 if large else 64, 8 if padded(keys) > 64 else 4)


def sum_shape(keys: int, values: int, dtype: torch.dtype, means: bool) -> Shape:
    """Of ``token_sums``. One program has all values, so that keys are read once; with ``means`` sums of values wait in registers too.

    Of 23 forms on one H100 within 5 % of the fastest, and within 99 KB: 39 us for 16 heads of 16,384 tokens with 72 channels (37 with four
    tiles on their way, 60 with two, 50 with twice the programs, 82 with keys summed across threads at every tile)."""
    if dtype == torch.bfloat16:
        return Shape(padded(keys), padded(values), 32 if means else 64, 8 if padded(keys) > 64 else 4, 3)
    return shape_of(keys, values, dtype)


def query_shape(keys: int, values: int, dtype: torch.dtype) -> Shape:
    """Of ``attend``, all values in one program too: of ten forms the fastest on one H100, with 72 channels and with 96."""
    if dtype == torch.bfloat16:
        return Shape(padded(keys), padded(values), 64, 4, 3)
    return shape_of(keys, values, dtype)


def kinds(dtype: torch.dtype) -> tuple[Any, str]:
    """What sums over tokens are multiplied in: their range is that of fp32."""
    if dtype == torch.float16:
        return tl.float32, "tf32"
    return (tl.bfloat16 if dtype == torch.bfloat16 else tl.float32), precisions(dtype)[1]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same as a dtype of PyTorch."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def alignment(*tensors: Tensor) -> int:
    """Elements (a power of two, 16 bytes at most) that divide every distance between rows [B, H, N]."""
    most = 16 // tensors[0].element_size()
    for x in tensors:
        (b, h, *_), (x_b, x_h, x_n, _) = x.shape, x.stride()
        together = x_n | (x_b if b > 1 else 0) | (x_h if h > 1 else 0)  # its lowest bit is that of the three
        most = min(most, together & -together or most)
    return most


class Start:
    """A kernel with its programs and all arguments but its pointers."""

    def __init__(self, kernel: Any, programs: tuple[int, int, int], numbers: tuple, switches: dict[str, Any]) -> None:
        self.kernel, self.programs, self.numbers, self.switches = kernel, programs, numbers, switches
        self.rest = (*numbers, *[switches[n] for n in kernel.arg_names if n in switches])
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        if self.compiled is None:  # always in Triton's interpreter
            self.compiled = self.kernel[self.programs](*tensors, *self.numbers, **self.switches)
        else:
            self.again(stream_of(tensors[0].get_device()), *[x.data_ptr() for x in tensors])

    def again(self, stream: int, *addresses: int) -> None:
        """On other memory. Addresses are integers: for a tensor, the launcher would ask the driver where it lies."""
        made = self.compiled
        made.run(*self.programs, stream, made.function, made.packed_metadata, None, None, None, *addresses, *self.rest)


def stream_of(device: int) -> int:
    """The handle of the current one."""
    return torch._C._cuda_getCurrentRawStream(device)


Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], bool]


def layout(x: Tensor | None) -> Layout | None:
    """All that compiling may depend on."""
    return None if x is None else (x.dtype, tuple(x.shape), x.stride(), x.data_ptr() % 16 == 0)


def row_strides(x: Layout | None) -> tuple[int, ...]:
    """Of batch, head and token; zeros for a tensor that is not there."""
    return (0, 0, 0) if x is None else x[2][:3]


def aligned(size: int) -> int:
    return -(-size // 16) * 16


@dataclass(frozen=True)
class Summing:
    """The sums of one kind of call. parts: of the tokens; size: entries of a part, the first ``pairs`` of them products.
    means_at, parts_at, bytes: where means and parts lie behind the joined products, and how much memory all take."""

    parts: int
    size: int
    pairs: int
    means_at: int
    parts_at: int
    bytes: int
    sum: Start
    join: Start


def parts_of(programs: int) -> int:
    """Into how many parts the tokens go, so that all programs fill the multiprocessors once, or else a few times."""
    for rounds in range(1, 5):
        parts = rounds * PROGRAMS // programs
        if parts * programs >= 0.9 * rounds * PROGRAMS:
            return parts
    return max(1, parts)


@functools.lru_cache(maxsize=256)
def summing(
    device: int, k: Layout, v: Layout, key_gate: Layout | None, value_gate: Layout | None, weighted: bool, means: bool, eps: float,
    inverse: float, align: int,
) -> Summing:  # fmt: skip
    (b, h, n, keys), values = k[1], v[1][3]
    heads, shape = b * h, sum_shape(keys, values, k[0], means)
    across = triton.cdiv(values, shape.values)
    tiles = triton.cdiv(n, shape.tokens)
    per = triton.cdiv(tiles, min(tiles, parts_of(heads * across)))
    parts, pairs = triton.cdiv(tiles, per), heads * keys * values
    size = pairs + heads * (keys + values * means)
    numbers = (
        *k[2], *v[2], *row_strides(key_gate), *row_strides(value_gate), inverse if parts == 1 else 1.0, eps, n, h, per * shape.tokens,
        size, pairs if parts > 1 else 0,
    )  # fmt: skip
    switches = {
        "HAS_KG": key_gate is not None,
        "HAS_VG": value_gate is not None,
        "WEIGHTED": weighted,
        "MEANS": means,
        "ALIGN": align,
    }
    first = Start(token_sums, (heads, parts, across), numbers, switches | shape.switches(keys, values, k[0]))
    join = Start(join_parts, (triton.cdiv(size, JOINED["BLOCK"]), 1, 1), (parts, size, pairs, inverse), JOINED)
    means_at = aligned(pairs * sum_dtype(k[0]).itemsize)
    parts_at = means_at + aligned((size - pairs) * 4)
    return Summing(
        parts, size, pairs, means_at, parts_at, parts_at + (parts * size * 4 if parts > 1 else 0), first, join
    )


def summing_of(
    k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, eps: float, inverse: float, means: bool, weighted: bool = False
) -> Summing:  # fmt: skip
    gates = layout(key_gate), layout(value_gate)
    return summing(k.get_device(), layout(k), layout(v), *gates, weighted, means, eps, inverse, alignment(k, v))


def sums(
    k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, eps: float, inverse: float, means: bool,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> k^T v [B H, K, V] and, one after the other in fp32, sums of k [B H, K] and (means) of v [B H, V]; gated, times inverse."""
    plan = summing_of(k, v, key_gate, value_gate, eps, inverse, means, weights is not None)
    pairs = k.new_empty((k.shape[0] * k.shape[1], k.shape[3], v.shape[3]), dtype=sum_dtype(k.dtype))
    rest = k.new_empty(plan.size - plan.pairs, dtype=torch.float32)
    gates = (k if x is None else x for x in (key_gate, value_gate))
    if plan.parts == 1:
        plan.sum(k, v, *gates, *(weights or (rest, rest)), pairs, rest)
    else:
        made = k.new_empty((plan.parts, plan.size), dtype=torch.float32)
        plan.sum(k, v, *gates, *(weights or (rest, rest)), made, made)
        plan.join(made, pairs, rest)
    return pairs, rest


@functools.lru_cache(maxsize=256)
def attending(
    device: int, q: Layout, added: Layout | None, out: Layout, divide: bool, scale: float, eps: float, align: int
) -> Start:
    (b, h, n, keys), values = q[1], out[1][3]
    shape = query_shape(keys, values, q[0])
    across, tiles = triton.cdiv(values, shape.values), triton.cdiv(n, shape.tokens)
    per = min(TILES, triton.cdiv(b * h * tiles * across, 2 * PROGRAMS)) * shape.tokens
    numbers = (
        *q[2],
        *out[2],
        *((0, 0, 0, 1) if added is None else added[2]),
        scale,
        eps,
        n,
        h,
        per,
        0 if added is None else n - added[1][2],
    )
    switches = {"DIVIDE": divide, "HAS_ADDED": added is not None, "COLUMNS": q[0] == torch.bfloat16, "ALIGN": align}
    return Start(attend, (b * h, triton.cdiv(n, per), across), numbers, switches | shape.switches(keys, values, q[0]))


def attending_of(q: Tensor, added: Tensor | None, out: Tensor, divide: bool, scale: float, eps: float) -> Start:
    align = alignment(q, out) if added is None else alignment(q, out, added)
    return attending(q.get_device(), layout(q), layout(added), layout(out), divide, scale, eps, align)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, added: Tensor | None, divide: bool, scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> out, and the sums for the backward."""
    if q.get_device() >= 0 and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return forward(q, k, v, key_gate, value_gate, added, divide, scale, eps)
    pairs, means = sums(k, v, key_gate, value_gate, eps if divide else 0.0, 1 / k.shape[2], not divide)
    out = torch.empty_like(v)
    attending_of(q, added, out, divide, scale, eps)(q, pairs, means, q if added is None else added, out)
    return out, pairs, means


@dataclass(frozen=True, slots=True)
class Steps:
    """All kernels of one kind of call, for other memory."""

    device: int
    sums: Summing
    attend: Start

    def __call__(self, out: Tensor, q: int, k: int, v: int, key_gate: int, value_gate: int, added: int) -> None:
        """Addresses; what this kind of call does not have is not read."""
        if self.device != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self(out, q, k, v, key_gate, value_gate, added)
            return
        stream, plan = stream_of(self.device), self.sums
        memory = out.new_empty(plan.bytes, dtype=torch.uint8)
        pairs = memory.data_ptr()
        means, parts = pairs + plan.means_at, pairs + plan.parts_at
        if plan.parts == 1:
            plan.sum.again(stream, k, v, key_gate, value_gate, means, means, pairs, means)
        else:
            plan.sum.again(stream, k, v, key_gate, value_gate, means, means, parts, parts)
            plan.join.again(stream, parts, pairs, means)
        self.attend.again(stream, q, pairs, means, added, out.data_ptr())


def steps_of(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, added: Tensor | None, out: Tensor, divide: bool,
    scale: float, eps: float,
) -> Steps | None:  # fmt: skip
    """Those that ``forward`` took for ``out``; None where nothing is compiled."""
    plan = summing_of(k, v, key_gate, value_gate, eps if divide else 0.0, 1 / k.shape[2], not divide)
    attend = attending_of(q, added, out, divide, scale, eps)
    return Steps(q.get_device(), plan, attend) if attend.compiled is not None else None
