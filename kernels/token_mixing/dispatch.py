"""What every operator here decides alike: whose kernel runs, and in which dtype it answers."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INSTALLED = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs its kernels on the CPU, for tests that ask for them by name.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ("triton", "torch")


def fused(implementation: str | None, x: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton's kernels take the call: by name, or (None) wherever they can. ValueError where the one named cannot."""
    if implementation is None:
        return INSTALLED and x.is_cuda and _floats(x, *others) and capability(x) >= (8, 0)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"there is no implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "torch":
        return False
    if not (INSTALLED and (x.is_cuda or INTERPRETED) and _floats(x, *others)):
        raise ValueError(
            f"the triton implementation needs triton, a GPU and fp16, bf16 or fp32 tensors; x is {x.dtype} on {x.device}. Leave "
            "implementation out to let PyTorch take such calls."
        )
    return True


def capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU that x is on; asked once a device outside compiled graphs."""
    return torch.cuda.get_device_capability(x.device) if torch.compiler.is_compiling() else _known(x.get_device())


@functools.lru_cache(maxsize=64)
def _known(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _floats(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in FLOATS for t in tensors)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a layer that multiplies would answer in: autocast's dtype where it is on, else x's own."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def learns(*tensors: Tensor) -> bool:
    """Whether a call must record gradients."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def wide(x: Tensor) -> Tensor:
    """In fp32 (fp64 stays)."""
    return x if x.dtype == torch.float64 else x.float()
