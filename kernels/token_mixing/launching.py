"""How an operator here runs: a kernel started at little cost on the host, gradients recorded at little cost, or a node of a compiled graph.

Notable choices
- Triton works out at every call what to compile; that takes longer than many of these kernels run. Its answer is kept with the kernel's
  compile-time arguments, for calls whose pointers and strides are multiples of 16; all others ask Triton.
- Outside compiled graphs an autograd function stands in for the ``torch.library`` operator, or nothing where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIMIT = 1 << 31  # of 32-bit integers


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b


def shared(total: int, most: int, tile: int) -> tuple[int, int]:
    """total shared out in at most ``most`` parts of whole tiles. -> parts, the size of one"""
    per = ceil(ceil(total, most), tile) * tile
    return ceil(total, max(1, per)), per


class Form:
    """A kernel with its compile-time arguments. Its other arguments are tensors, strides, sizes that it is not specialised on, and floats."""

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: int) -> None:
        self.kernel, self.options = kernel, options
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.kept: dict[tuple, Any] = {}

    def __call__(
        self, programs: int, tensors: tuple[Tensor, ...], strides: tuple[int, ...], sizes: tuple[int, ...], floats: tuple[float, ...] = ()
    ) -> None:  # fmt: skip
        device, pointers, steps = tensors[0].get_device(), 0, 0
        for t in tensors:
            pointers |= t.data_ptr()
        for n in strides:
            steps |= n
        if device < 0 or (pointers | steps) & 15 or steps >= LIMIT or max(sizes) >= LIMIT:
            return self._ask(device, programs, (*tensors, *strides, *sizes, *floats))
        key = (device, *[t.dtype for t in tensors])
        compiled = self.kept.get(key)
        if compiled is None or device != torch.cuda.current_device():
            self.kept[key] = self._ask(device, programs, (*tensors, *strides, *sizes, *floats))
        else:
            compiled[(programs, 1, 1)](*tensors, *strides, *sizes, *floats, *self.constants.values())
        return None

    def _ask(self, device: int, programs: int, args: tuple) -> Any:
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._ask(device, programs, args)
        return self.kernel[(programs,)](*args, **self.constants, **self.options)


class Operator:
    """``run`` as an operator ``foveal::name``. setup and backward as ``torch.library.register_autograd`` takes them, or none."""

    def __init__(
        self, name: str, run: Callable, fake: Callable, setup: Callable | None = None, backward: Callable | None = None
    ) -> None:
        self.run, self.node = run, torch.library.custom_op(f"foveal::{name}", run, mutates_args=())
        self.node.register_fake(fake)
        self.function: Any = None
        if setup is not None and backward is not None:
            self.node.register_autograd(backward, setup_context=setup)
            self.function = _recorded(name, run, setup, backward)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.node(*args)
        if self.function is not None and torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return self.function.apply(*args)
        return self.run(*args)


def _recorded(name: str, run: Callable, setup: Callable, backward: Callable) -> Any:
    """An autograd function. Its forward takes the context: a separate ``setup_context`` makes a call ten times as long on the host."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup(ctx, args, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), parts)
