"""What each implementation needs, as data: dispatch, refusals and the README's support table all come from here."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.block_sparse.plan_forms import fields
from foveal.kernels.block_sparse.tiles import hopper_keys, row_table, worth

LEAST_SCALE = 1e-6  # times -2^100 it still hides a key
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
# Facts of the process, so that compiled graphs need not ask. Triton's interpreter runs its kernels on the CPU, for tests.
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton",)}
INTERPRETED = INSTALLED["triton"] and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Needs:
    """Requirements of one implementation of ``block_sparse_attention``.

    devices     torch device types it runs on, or ("any",)
    dtypes      of q, k and v
    head_dim    smallest and largest
    capability  lowest NVIDIA compute capability, or None
    only        the one major compute capability it is written for, or None
    multiple    head_dim must be a multiple of it
    rows        k and v must be rows of one table: [B, N, H, D] or [B, H, N, D] data, parts of fused projections too
    requires    importable package, or None
    note        one line for the support table
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dim: tuple[int, int]
    capability: tuple[int, int] | None = None
    only: int | None = None
    multiple: int = 1
    rows: bool = False
    requires: str | None = None
    note: str = ""

    def refusal(self, q: Tensor, by_name: bool = False) -> str | None:
        """Why it cannot take q [B, H, N, D], or None. Triton's interpreter is taken only when asked for by name."""
        if self.requires and not INSTALLED[self.requires]:
            return f"the package {self.requires} is not installed"
        if self.only and not q.is_cuda:
            return f"it runs on cuda, q is on {q.device.type}"
        if "any" not in self.devices and q.device.type not in self._devices(by_name):
            return f"it runs on {' or '.join(self.devices)}, q is on {q.device.type}"
        if q.dtype not in self.dtypes:
            return f"dtype {name_of(q.dtype)} is none of {', '.join(map(name_of, self.dtypes))}"
        if self.requires == "triton" and q.device.type == "cpu" and q.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 as integers"
        low, high = self.head_dim
        if not low <= q.shape[-1] <= high:
            return f"head_dim {q.shape[-1]} is outside {low} to {high}"
        if q.shape[-1] % self.multiple:
            return f"head_dim {q.shape[-1]} is not a multiple of {self.multiple}"
        if self.only and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] != self.only:
            have = torch.cuda.get_device_capability(q.device)
            return f"it is written for compute capability {self.only}.0, the device has {have[0]}.{have[1]}"
        if self.capability and q.is_cuda and torch.cuda.get_device_capability(q.device) < self.capability:
            have = torch.cuda.get_device_capability(q.device)
            return f"it needs compute capability {self.capability[0]}.{self.capability[1]}, the device has {have[0]}.{have[1]}"
        return None

    def call_refusal(
        self, q: Tensor, plan: BlockPlan, k: Tensor | None = None, v: Tensor | None = None, scale: float | None = None
    ) -> str | None:
        """Why it cannot take this plan, these keys and this scale, or None. Keys that are not given are taken as contiguous."""
        if not self.rows:
            return None
        if scale is not None and scale < LEAST_SCALE:
            return f"the scale {scale} is below {LEAST_SCALE}"
        if plan.box is not None and fields(plan.box) is None:
            return "the box mask's coordinates need more than 32 bits"
        if plan.proxies is not None and not _in_place(q, plan):
            return "with proxies it takes queries in plan order, 64 or 128 channels wide, that are rows of one aligned table"
        permuted = plan.kv_order is not None and not plan.ordered  # then keys are copied, and lie well
        for name, x in (("k", k), ("v", v)):
            if x is None or permuted:
                continue
            # A graph that is being compiled cannot read the offset; its calls copy what turns out unaligned.
            offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
            if row_table(x.shape, x.stride()) is None or offset * x.element_size() % 16:
                return f"{name} with shape {tuple(x.shape)} and strides {x.stride()} is not rows of one aligned table"
        return None

    def _devices(self, by_name: bool) -> tuple[str, ...]:
        return (*self.devices, "cpu") if self.requires == "triton" and INTERPRETED and by_name else self.devices


def _in_place(q: Tensor, plan: BlockPlan) -> bool:
    """Whether the copy engine can fetch queries from where they lie."""
    ordered = plan.q_order is None or plan.ordered
    aligned = torch.compiler.is_compiling() or q.storage_offset() * q.element_size() % 16 == 0
    return bool(ordered and q.shape[-1] in (64, 128) and aligned) and row_table(q.shape, q.stride()) is not None


def slower(name: str, plan: BlockPlan) -> str | None:
    """Why the portable kernel is expected to be faster than ``name`` on this plan, or None."""
    if name != "hopper":
        return None
    here, there = worth(name, plan, hopper_keys(plan)), worth("triton", plan, 64)
    if here >= there:
        return None
    return f"blocks of {plan.max_q_len} queries and {plan.max_kv_len} keys fill too little of its tiles"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# In order of preference.
IMPLEMENTATIONS: dict[str, Needs] = {
    "hopper": Needs(
        devices=("cuda",), dtypes=HALF, head_dim=(16, 128), only=9, multiple=8, rows=True, requires="triton",
        note="warp-specialised (Gluon); chosen where its 128-row tiles are well filled; backward through the torch implementation",
    ),
    "triton": Needs(
        devices=("cuda",), dtypes=FLOATS, head_dim=(16, 256), capability=(8, 0), requires="triton",
        note="portable kernel, fits 99 KB of shared memory; backward through the torch implementation",
    ),
    "torch": Needs(
        devices=("any",), dtypes=(*FLOATS, torch.float64), head_dim=(1, 1024),
        note="gather and SDPA: large query blocks one by one, small ones in batches",
    ),
    "reference": Needs(
        devices=("any",), dtypes=(*FLOATS, torch.float64), head_dim=(1, 1 << 30),
        note="dense mask, quadratic memory: the oracle, chosen only by name",
    ),
}  # fmt: skip


def support_table(implementations: dict[str, Needs] = IMPLEMENTATIONS, width: str = "head dim") -> str:
    """The implementations and what they need, as a Markdown table."""
    lines = [f"| implementation | devices | dtypes | {width} | note |", "|---|---|---|---|---|"]
    for name, need in implementations.items():
        devices = ", ".join(need.devices) + (
            f" (compute capability {need.capability[0]}.{need.capability[1]} and later)" if need.capability else ""
        )
        devices += f" (compute capability {need.only}.0)" if need.only else ""
        dims = f"{need.head_dim[0]} to {need.head_dim[1]}" if need.head_dim[1] < 1 << 20 else "any"
        dims += f", multiples of {need.multiple}" if need.multiple > 1 else ""
        lines.append(f"| `{name}` | {devices} | {', '.join(map(name_of, need.dtypes))} | {dims} | {need.note} |")
    return "\n".join(lines)
