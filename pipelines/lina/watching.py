"""What ran inside a LINA: a record in the form of the other models', written by hooks on its attention modules.

Notable choices
- Nothing is replaced: the model keeps its own linear attention, and every call is recorded as one that sees all tokens.
- Times of attention are those of whole modules, projections and convolution included: the core is not called apart.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from foveal.plugins.clock import Mark, start_clock, stop_clock
from foveal.plugins.record import LayerRecord, Record
from foveal.vision.lina import LinaModel
from foveal.vision.lina_attention import LinearAttention

REASON = "the model's own linear attention: every token reaches every other"


class LinearRecord(Record):
    """A record whose attention is linear."""

    def implementations(self) -> list[str]:
        return ["linear"]


class Watch:
    """A context manager around sampling; ``record`` holds what ran."""

    def __init__(self, model: LinaModel) -> None:
        self.record = LinearRecord()
        self._model = model
        self._hooks: list[Any] = []
        self._step = 0
        self._start: Mark = None

    def __enter__(self) -> Watch:
        found = [(name, m) for name, m in self._model.named_modules() if isinstance(m, LinearAttention)]
        for i, (name, module) in enumerate(found):
            self._watch(self.record.add_layer("", name, "self", i, "dense"), module)
        self._start = start_clock(self._model.mask_token.device)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def step_done(self) -> None:
        """Called after every step of the sampler: what ran since the last call was one step's work."""
        self.record.ran_forward("model", self._step, stop_clock(self._start))
        self._step += 1
        self._start = start_clock(self._model.mask_token.device)

    def restart(self) -> None:
        """Called when sampling begins."""
        self._step, self._start = 0, start_clock(self._model.mask_token.device)

    def _watch(self, row: LayerRecord, module: nn.Module) -> None:
        marks: list[Mark] = []

        def before(module: nn.Module, args: Any) -> None:
            marks.append(start_clock(self._model.mask_token.device))

        def after(module: nn.Module, args: Any, out: Any) -> None:
            self.record.ran_dense(row, self._step, REASON, stop_clock(marks.pop()))

        self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
