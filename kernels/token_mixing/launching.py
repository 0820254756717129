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
        self.values = tuple(self.constants.values())
        self.kept: dict[tuple, Any] = {}

    def __call__(
        self, programs: int, tensors: tuple[Tensor, ...], strides: tuple[int, ...], sizes: tuple[int, ...], floats: tuple[float, ...] = ()
    ) -> None:  # fmt: skip
        device = tensors[0].get_device()
        pointers = [t.data_ptr() for t in tensors]
        key = (device, *[t.dtype for t in tensors])
        compiled = self.kept.get(key)
        if compiled is None or device != torch._C._cuda_getDevice() or not _even(pointers, strides, sizes):
            made = self._ask(device, programs, (*tensors, *strides, *sizes, *floats))
            if device >= 0 and _even(pointers, strides, sizes):
                self.kept[key] = made
            return
        # Pointers go as integers: for a tensor, the launcher would ask the driver where it lies.
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *pointers, *strides, *sizes, *floats, *self.values,
        )  # fmt: skip

    def _ask(self, device: int, programs: int, args: tuple) -> Any:
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._ask(device, programs, args)
        return self.kernel[(programs,)](*args, **self.constants, **self.options)


def _even(pointers: list[int], strides: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Whether the kernel that is kept was compiled for such arguments: multiples of 16 throughout, 32 bits."""
    bits, steps = 0, 0
    for pointer in pointers:
        bits |= pointer
    for n in strides:
        steps |= n
    return not (bits | steps) & 15 and steps < LIMIT and max(sizes) < LIMIT


class Operator:
    """``run`` as an operator ``foveal::name``. setup and backward as ``torch.library.register_autograd`` takes them, or none."""

    def __init__(
        self, name: str, run: Callable, fake: Callable, setup: Callable | None = None, backward: Callable | None = None
    ) -> None:
        self.run, self.node, self.function = run, _node(f"foveal::{name}", run, fake, setup, backward), None
        if setup is not None and backward is not None:
            self.function = _recorded(name, run, setup, backward)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.node(*args)
        if self.function is not None and torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return self.function.apply(*args)
        return self.run(*args)


def _node(name: str, run: Callable, fake: Callable, setup: Callable | None, backward: Callable | None) -> Any:
    """The operator for compiled graphs. Without gradients it is registered by hand: what ``custom_op`` puts around it doubles a call's time."""
    if setup is not None and backward is not None:
        node = torch.library.custom_op(name, run, mutates_args=())
        node.register_fake(fake)
        node.register_autograd(backward, setup_context=setup)
        return node
    torch.library.define(name, torch.library.infer_schema(run, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.foveal, name.removeprefix("foveal::")).default


def _recorded(name: str, run: Callable, setup: Callable, backward: Callable) -> Any:
    """An autograd function. Its forward takes the context: a separate ``setup_context`` makes a call ten times as long on the host."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup(ctx, args, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), parts)
