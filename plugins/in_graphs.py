"""Layers in compiled graphs: their tickets, and the gradients of the operators that stand for them. Hosts share this.

Letters: B batch, H heads, Hkv key heads, N query tokens, M key tokens, D head dim.

* An operator takes the layer's ticket as a 0-d CPU tensor: a number in traced code would compile once per layer, and again at every step.
* Inside, the layer runs as it does without a compiler: same method, same state, same record.
* Its backward computes the call again with gradients, as gradient checkpointing does; state and record stay as they were.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]

# A graph can carry a number, not an object.
_LIVE: MutableMapping[int, Any] = weakref.WeakValueDictionary()
_TICKETS = count()


def ticket_of(layer: Any) -> Tensor:
    """A new ticket for a layer, good as long as the layer lives: 0-d int64 on the CPU."""
    number = next(_TICKETS)
    _LIVE[number] = layer
    return torch.tensor(number)


def layers_of(tickets: Tensor) -> list[Any]:
    """The layers of tickets [n], or of one ticket []."""
    return [_LIVE[number] for number in tickets.reshape(-1).tolist()]


def gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> Gradients:
    """Gradients of q, k, v, contiguous, from an attention computed again. grad has the shape of ``attend(q, k, v)``."""
    with _autograd_inside_an_operator(), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        dq, dk, dv = torch.autograd.grad(attend(q, k, v), (q, k, v), grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def differentiate(operator: Any, backward: Any) -> None:
    """Let one operator be the backward of another.

    operator   of (q, k, v, mask, ticket, ...) -> Tensor; what comes after the ticket is no tensor
    backward   of (grad, q, k, v, mask, ticket, ...) -> gradients of q, k, v, contiguous
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rest = inputs[5:]
        ctx.save_for_backward(*inputs[:5])

    def run(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, *(None for _ in ctx.rest))

    def shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Gradients:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    operator.register_autograd(run, setup_context=setup)
    backward.register_fake(shapes)


def _autograd_inside_an_operator() -> Any:
    """Operators run below autograd; this lets one differentiate inside itself."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(include, exclude)
