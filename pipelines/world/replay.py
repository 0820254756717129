"""A training step recorded once as a CUDA graph and replayed: the host starts one thing instead of two thousand.

A model of a few million parameters is trained as fast as the host can start its kernels: 55 ms a step on an H100, of
which the device works 10 to 20. Recorded, a step takes what the device needs.

Notable choices
- Forward, backward, clipping and the optimizer are recorded, one graph for each shape of batch; data are drawn outside and
  copied in, the average of the weights is kept outside.
- The optimizer's state must exist when a step is recorded: a run's first step is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM = 3  # ordinary forwards and backwards before the recording, which compile and settle the allocator


class Replay:
    """One shape's step.  objective(*batch) -> loss; advance(loss): backward, clipping and the optimizer's step"""

    def __init__(
        self, objective: Callable[..., Tensor], advance: Callable[[Tensor], None], batch: tuple[Tensor, ...],
        parameters: list[nn.Parameter],
    ) -> None:  # fmt: skip
        self.batch = tuple(x.clone() for x in batch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                _forget(parameters)
                objective(*self.batch).backward()
        torch.cuda.current_stream().wait_stream(side)
        _forget(parameters)  # gradients are then made in the graph's own memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss = objective(*self.batch)
            advance(loss)
        self.loss = loss.detach()

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        """One step on new data of the same shapes.  -> its loss, 0-d, overwritten by the next call"""
        for held, new in zip(self.batch, batch, strict=True):
            held.copy_(new)
        self.graph.replay()
        return self.loss


def _forget(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
