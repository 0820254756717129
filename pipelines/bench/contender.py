"""One contender of `bench layers`: a model that shares its weights with the others, its blocks timed, a method in it or none.

Notable choices
- Blocks are timed by hooks around them, registered before the method enters, so that whatever the method does inside a block is in
  its time. The rest of the call (embedding, root hook, token order, output) is what a model pays once, however deep it is.
- Compiled blocks: their forward is, under the same hooks and with the same settings for every contender, whole graphs or an error.
- Where all text is valid its mask is taken away from the blocks, as a caller could do: the baseline is not made slow.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.bench.models import METHODS, Inputs, Rival, blocks_of
from foveal.pipelines.bench.rounds import Stopwatch
from foveal.plugins.accelerate import accelerate


def unmask(block: nn.Module) -> None:
    """Let a block be called without a mask that hides nothing."""
    at = list(inspect.signature(block.forward).parameters).index("attention_mask")

    def without(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {"attention_mask": None} if "attention_mask" in kwargs else {}
        return tuple(None if i == at else x for i, x in enumerate(args)), kwargs | named

    block.register_forward_pre_hook(without, with_kwargs=True)


class Contender:
    """depths: blocks of each kind in the real model, one kind per block here (or one for all). compiler: of a compiled rival.

    After calls: ``blocks_ms()``, ``rest_ms()`` and ``model_ms()`` have a figure per call; ``peak`` is in bytes, 0 off the GPU.
    """

    def __init__(
        self, model: nn.Module, rival: Rival, unmasked: bool, device: torch.device, depths: Sequence[int],
        compiler: str | None = None,
    ) -> None:  # fmt: skip
        shared: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.device, self.peak = device, 0
        self.blocks, self.whole = Stopwatch(device), Stopwatch(device)
        self.host: list[float] = []
        found = blocks_of(self.model)
        for block in found:
            if unmasked:
                unmask(block)
            block.register_forward_pre_hook(lambda *_: self.blocks.start())
            block.register_forward_hook(lambda *_: self.blocks.stop())
        self.weights = list(depths) if len(depths) == len(found) else [sum(depths) / len(found)] * len(found)
        self.handle = accelerate(self.model, METHODS[rival.method], **rival.knobs) if rival.method else None
        if self.handle is not None:
            self.handle.fused = rival.fused
        for block in found if rival.compiled else ():
            whole: Any = block  # a module's own forward may be put in its place
            whole.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=compiler or "inductor")

    def __call__(self, inputs: Inputs) -> Tensor:
        """One timed call. -> the model's output"""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            started = time.perf_counter()
            self.whole.start()
            out: Tensor = self.model(**inputs, return_dict=False)[0]
            self.whole.stop()
            self.host.append(1e3 * (time.perf_counter() - started))
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return out

    def forget(self) -> None:
        """Drop the times so far (warm-up)."""
        self.blocks.marks, self.whole.marks, self.host = [], [], []
        if self.handle is not None:
            self.handle.record.reset()

    # ---- figures
    def _deep(self) -> list[float]:
        """Per call: milliseconds of all blocks of a model of real depth."""
        spent, n = self.blocks.times(), len(self.weights)
        calls = [spent[i : i + n] for i in range(0, len(spent), n)]
        return [sum(w * ms for w, ms in zip(self.weights, call, strict=True)) for call in calls]

    def blocks_ms(self) -> list[float]:
        """Per call: milliseconds of one block, the mean over the real model."""
        return [ms / sum(self.weights) for ms in self._deep()]

    def rest_ms(self) -> list[float]:
        """Per call: milliseconds outside the blocks."""
        spent, n = self.blocks.times(), len(self.weights)
        inside = [sum(spent[i : i + n]) for i in range(0, len(spent), n)]
        return [a - b for a, b in zip(self.whole.times(), inside, strict=True)]

    def model_ms(self) -> list[float]:
        """Per call: milliseconds of a model of real depth."""
        return [a + b for a, b in zip(self._deep(), self.rest_ms(), strict=True)]

    def host_ms(self) -> float:
        """Milliseconds the host needs to issue one call of this model."""
        return statistics.median(self.host)

    def attention_ms(self) -> float:
        """Milliseconds of one attention call: order, plan, kernel and inverse, or dense attention."""
        assert self.handle is not None
        rows = [layer for layer in self.handle.record.layers if layer.calls]
        return 1e3 * sum(layer.seconds() for layer in rows) / sum(layer.calls for layer in rows)
