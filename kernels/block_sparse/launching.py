"""Starting a compiled kernel without asking Triton again what to compile.

With a hundred arguments, working out the specialisation costs Triton a few hundred microseconds a call, more than many kernels run. Here the
compiled form is kept with the plan, under a key that says everything a compiler may specialise on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BIG = 2**31


def specialised(integers: Sequence[int], tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """What a compiler may make of integers (1, multiple of 16) and pointers (16-byte aligned); None where an integer needs 64 bits."""
    if any(x >= BIG for x in integers):
        return None
    return (
        *((x == 1) + 2 * (x % 16 == 0) for x in integers),
        *(None if x is None else x.data_ptr() % 16 == 0 for x in tensors),
    )


def launch(kernel: Any, programs: tuple[int, int, int], args: list[Any], switches: dict[str, Any], options: dict[str, int],
           kept: dict[Any, Any], key: tuple[Any, ...] | None, device: torch.device) -> None:  # fmt: skip
    """``kernel[programs](*args, **switches, **options)`` on ``device``; the compiled form is kept in ``kept`` under ``key``."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, args, switches, options, kept, key, device)
    if key is None or device.type != "cuda":
        kernel[programs](*args, **switches, **options)
        return None
    compiled = kept.get(key)
    if compiled is None:
        kept[key] = kernel[programs](*args, **switches, **options)
    else:
        compiled[programs](*args, *(switches[name] for name in kernel.arg_names[len(args) :]))
    return None
