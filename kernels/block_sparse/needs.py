"""What each implementation needs, as data: dispatch, refusals and the README's support table all come from here."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

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
    requires    importable package, or None
    note        one line for the support table
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dim: tuple[int, int]
    capability: tuple[int, int] | None = None
    requires: str | None = None
    note: str = ""

    def refusal(self, q: Tensor, by_name: bool = False) -> str | None:
        """Why it cannot take q [B, H, N, D], or None. Triton's interpreter is taken only when asked for by name."""
        if self.requires and not INSTALLED[self.requires]:
            return f"the package {self.requires} is not installed"
        if "any" not in self.devices and q.device.type not in self._devices(by_name):
            return f"it runs on {' or '.join(self.devices)}, q is on {q.device.type}"
        if q.dtype not in self.dtypes:
            return f"dtype {name_of(q.dtype)} is none of {', '.join(map(name_of, self.dtypes))}"
        if self.requires == "triton" and q.device.type == "cpu" and q.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 as integers"
        low, high = self.head_dim
        if not low <= q.shape[-1] <= high:
            return f"head_dim {q.shape[-1]} is outside {low} to {high}"
        if self.capability and q.is_cuda and torch.cuda.get_device_capability(q.device) < self.capability:
            have = torch.cuda.get_device_capability(q.device)
            return f"it needs compute capability {self.capability[0]}.{self.capability[1]}, the device has {have[0]}.{have[1]}"
        return None

    def _devices(self, by_name: bool) -> tuple[str, ...]:
        return (*self.devices, "cpu") if self.requires == "triton" and INTERPRETED and by_name else self.devices


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# In order of preference.
IMPLEMENTATIONS: dict[str, Needs] = {
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


def support_table() -> str:
    """The implementations and what they need, as a Markdown table."""
    lines = ["| implementation | devices | dtypes | head dim | note |", "|---|---|---|---|---|"]
    for name, need in IMPLEMENTATIONS.items():
        devices = ", ".join(need.devices) + (
            f" (compute capability {need.capability[0]}.{need.capability[1]} and later)" if need.capability else ""
        )
        dims = f"{need.head_dim[0]} to {need.head_dim[1]}" if need.head_dim[1] < 1 << 20 else "any"
        lines.append(f"| `{name}` | {devices} | {', '.join(map(name_of, need.dtypes))} | {dims} | {need.note} |")
    return "\n".join(lines)
