"""A call of linear attention like one before: the host hands its kernels new pointers and does nothing else.

Notable choices
- Checks, layouts, tiles and what Triton compiles follow from dtypes, shapes, strides, devices and alignment alone. They are worked out at the
  first call of a kind; again, that would take the host longer than the kernels take the GPU.
- Calls that record gradients or that a compiler reads are not kept: they go through the operators.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

KEPT_ON = ("cuda",)
KEPT = 1024  # kinds of calls


def kept(tensors: tuple[Tensor | None, ...], *settings: Any) -> tuple[list[Any], list[int]] | None:
    """Where the steps of this kind of call are kept (empty before its first), and the tensors' addresses, 0 for none.

    None where no step may be kept: gradients, compilers, other devices, tensors without strides.
    """
    if torch.compiler.is_compiling() or tensors[0] is None or tensors[0].device.type not in KEPT_ON:
        return None
    learns = torch.is_grad_enabled()
    kind, addresses = list(settings), []
    for x in tensors:
        if x is None:
            kind.append(None)
            addresses.append(0)
            continue
        if (learns and x.requires_grad) or x.layout != torch.strided or x.is_nested:
            return None
        at = x.data_ptr()
        addresses.append(at)
        kind += x.dtype, x.shape, x.stride(), x.get_device(), at % 16 == 0
    return _place(*kind), addresses


@functools.lru_cache(maxsize=KEPT)
def _place(*kind: Any) -> list[Any]:
    return []
