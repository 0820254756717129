"""The root of a ViT, followed: which grid this call has, tokens put in order once, and the clock around it.

* Tokens are permuted behind the position embedding and put back behind the last norm. Everything between is per token, or attention,
  which does not mind. Where something minds (intermediate outputs, hooks on blocks, a mask), plans carry the order instead, and the
  summary says so.
* Gradient checkpointing runs blocks again in the backward pass, maybe after calls on pictures of another size. A hook on the output's
  gradient brings the facts of that call back first.
* In a model compiled as a whole nothing is kept on the host: the grid goes into the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveal.plugins.accelerate import AccelerateError
from foveal.plugins.clock import start_clock, stop_clock
from foveal.plugins.method import Method
from foveal.plugins.record import Record
from foveal.plugins.timm_host.frame import NOW, Frame, frame_of, plane_of
from foveal.plugins.timm_host.recognise import mixes_places

ONCE = "tokens are put in order once per model call"
EVERY = "tokens are put in order at every attention call, because"
NO_TRACE = "remove the handle first, or use torch.compile or torch.export."
NO_SCRIPT = f"an accelerated model cannot become TorchScript, which knows nothing of plans; {NO_TRACE}"
NO_FX = f"an accelerated model cannot be traced symbolically, because its plan depends on the size of the picture; {NO_TRACE}"


class Root:
    """What happens around one ViT while it runs. ``enabled``: may tokens be permuted once per call?"""

    def __init__(self, model: nn.Module, component: str, method: Method, record: Record, recognised: set[str]) -> None:
        self.component, self.method, self.record = component, method, record
        self.kind, self.prefix = type(model).__name__, int(model.num_prefix_tokens)  # type: ignore[arg-type]
        self.enabled = True
        self.after_call: Callable[[], None] = lambda: None
        self._blocks = list(model.blocks.modules())  # type: ignore[union-attr]
        self._mixes = mixes_places(model, recognised)
        self._last: Frame | None = None

    def frame(self, recomputing: bool) -> Frame | None:
        """The call under way, or the one whose backward pass computes again."""
        if recomputing:
            return self._last
        return NOW.frame if NOW.root is self else None

    # ---- the call
    def run(self, forward: Callable[..., Any], model: Any, call: Mapping[str, Any], once: bool) -> Any:
        """``forward`` with these arguments. once: its output is in the order of the tokens, so they may be permuted."""
        refuse_tracing(next(iter(call.values()), None))
        if torch.compiler.is_compiling():
            return self._run_traced(forward, model, call)
        frame = frame_of(model, call)
        frame = dataclasses.replace(frame, order=self._order(model, frame, once))
        with self._under_way(frame, call):
            out = forward(model, **call)
        self._remember(out, frame)
        self.after_call()
        return _each(out, frame.restore)

    def _run_traced(self, forward: Callable[..., Any], model: Any, call: Mapping[str, Any]) -> Any:
        NOW.plane = plane_of(model, next(iter(call.values()))) or (0, 0)
        out = forward(model, **call)
        NOW.plane = None
        return out

    @contextmanager
    def _under_way(self, frame: Frame, call: Mapping[str, Any]) -> Iterator[None]:
        before, NOW.frame, NOW.root = (NOW.frame, NOW.root), frame, self
        mark = start_clock(_device(call)) if self.record.timing else None
        try:
            yield
        finally:
            NOW.frame, NOW.root = before
            self.record.ran_forward(self.component, 0, stop_clock(mark))

    def _remember(self, out: Any, frame: Frame) -> None:
        self._last = frame
        _each(out, lambda y: _on_backward(y, partial(self._recall, frame)))

    def _recall(self, frame: Frame, grad: Tensor) -> None:
        self._last = frame

    # ---- the order
    def _order(self, model: Any, frame: Frame, once: bool) -> Any:
        """What to permute the tokens of this call by, or None."""
        if not frame.groups:
            return None
        rows, columns = frame.groups[0].grid
        if frame.prefix + rows * columns < self.method.min_tokens:
            return None
        order = self.method.order((1, rows, columns))
        if order is None or order.identity:
            return None
        why = self._why_not_once(model, frame, once)
        self.record.note(f"{self.kind}: {ONCE}." if why is None else f"{self.kind}: {EVERY} {why}.")
        return order if why is None else None

    def note_compiled(self, frame: Frame) -> None:
        """A layer runs inside the graph of the whole model."""
        order = self.method.order((1, *frame.groups[0].grid)) if min(frame.groups[0].grid) else None
        if order is not None and not order.identity:
            self.record.note(f"{self.kind}: {EVERY} the model is one compiled graph.")

    def _why_not_once(self, model: Any, frame: Frame, once: bool) -> str | None:
        if not self.enabled:
            return "order_hook is off"
        if frame.padded:
            return "a padded batch runs one grid at a time"
        if not once:
            return "intermediate outputs are asked for"
        if not hasattr(model, "_pos_embed") and not hasattr(model, "_forward_embeds"):
            return "this model has no place to permute them once"
        if getattr(model, "rope_is_mixed", False):
            return "its rotary tables are made block by block"
        if any(m._forward_hooks or m._forward_pre_hooks for m in self._blocks):
            return "a hook looks into the blocks"
        return self._mixes

    def embedded(self, out: Any) -> Any:
        """The output of the position embedding (x, or x and its rotary table, or a dict of both), put in order."""
        frame = self.frame(False)
        if frame is None or frame.order is None:
            return out
        if isinstance(out, dict):
            rope = out.get("rope_embeds")
            table = rope if rope is None else frame.arrange_rope(rope)
            return {**out, "patches": frame.arrange(out["patches"]), "rope_embeds": table}
        if isinstance(out, tuple):
            x, rope = out
            return frame.arrange(x), rope if rope is None else frame.arrange_rope(rope)
        return frame.arrange(out)


def refuse_tracing(x: Any) -> None:
    """Raises ``AccelerateError`` inside ``torch.jit.trace`` and ``torch.fx.symbolic_trace``."""
    if torch.jit.is_tracing() and not torch.compiler.is_compiling():
        raise AccelerateError(NO_SCRIPT)
    if isinstance(x, torch.fx.Proxy):
        raise AccelerateError(NO_FX)


def _each(out: Any, change: Callable[[Tensor], Any]) -> Any:
    """``change`` on the token tensors [B, N, C] of an output: a tensor, or a dict or (nested) list of them."""
    if isinstance(out, Tensor):
        return change(out) if out.is_floating_point() else out
    if isinstance(out, dict):
        return {key: _each(value, change) for key, value in out.items()}
    return type(out)(_each(value, change) for value in out) if isinstance(out, (list, tuple)) else out


def _on_backward(y: Tensor, hook: Callable[[Tensor], None]) -> Tensor:
    if y.requires_grad:
        y.register_hook(hook)
    return y


def _device(call: Mapping[str, Any]) -> torch.device:
    values = [y for x in call.values() for y in (x.values() if isinstance(x, dict) else (x,))]
    return next((x.device for x in values if isinstance(x, Tensor)), torch.device("cpu"))
