"""The numerical noise floor: dense against dense, computed by another exact attention backend.

A PSNR above this floor says nothing: two exact implementations differ by as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def other_exact_backend() -> Iterator[str]:
    """Run scaled-dot-product attention with the plain `math` backend; yields its name for the record."""
    with sdpa_kernel([SDPBackend.MATH]):
        yield "sdpa math"


def sdpa_backends(device: torch.device | str) -> dict[str, SDPBackend]:
    """The SDPA backends that may exist on a device, by name; whether one takes a given call shows only when it is tried."""
    names = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if torch.device(device).type == "cuda":
        names = {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH,
        }
    return names
