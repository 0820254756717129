"""The bound processor: a layer's own processor, with only its call ``softmax(Q K^T) V`` taken over.

Letters as in layer.py.

* Projections, norms, RoPE, concatenation and output stay diffusers': LoRA, quantised weights and fused projections keep working.
* Two ways to catch the call: a backend in diffusers' attention dispatcher where the processor has ``_attention_backend``, else a
  function mode that is active only while the processor runs. Both trace without graph breaks.
* In a compiled graph the call is one operator that carries the layer's number as a tensor: one graph serves all layers, and the
  method runs as it does outside.
* The original processor is never changed; a private copy of it does the work (for HunyuanVideo 1.5, a restatement of it).
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foveal.plugins.accelerate import AccelerateError
from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.compiled import attend_in_graph
from foveal.plugins.diffusers_host.composition import IP_ADAPTER_FIRST, NO_CONTEXT_PARALLEL
from foveal.plugins.diffusers_host.fused import fusion_of
from foveal.plugins.diffusers_host.hunyuan15_processor import restated
from foveal.plugins.diffusers_host.layer import Core, Layer

SDPA = F.scaled_dot_product_attention


class _Slot(threading.local):
    """The bound processor that runs in this thread: a backend function is told nothing about its layer."""

    def __init__(self) -> None:  # once per thread; a class attribute would make the compiler see two kinds of slot
        self.bound: BoundProcessor | None = None


_SLOT = _Slot()


def foveal_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Our backend in diffusers' dispatcher; parameter names are diffusers'."""
    if _parallel_config is not None:
        raise AccelerateError(NO_CONTEXT_PARALLEL)
    core = Core(query, key, value, attn_mask, scale, enable_gqa, is_causal, dropout_p)
    bound = _SLOT.bound
    if bound is None:  # selected by name, outside any accelerated layer
        return private.native_attention()(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return bound.attend(core)


class _Intercept(TorchFunctionMode):
    """Takes ``scaled_dot_product_attention`` away from the processor that runs inside it."""

    def __init__(self, bound: BoundProcessor) -> None:
        super().__init__()
        self.bound = bound

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            return self._sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self.bound.attend(Core(q, k, v, attn_mask, scale, enable_gqa, is_causal, dropout_p)).transpose(1, 2)


class BoundProcessor:
    """Stands in for a layer's processor. ``bind`` makes the subclass that shows the wrapped signature."""

    def __init__(
        self, original: Any = None, make_layer: Callable[[Callable[[Core], Tensor]], Layer] | None = None
    ) -> None:
        if make_layer is None:  # loaders of IP adapters call the class of whatever processor a layer has
            raise AccelerateError(IP_ADAPTER_FIRST)
        self.original = original
        self.layer = make_layer(self.dense)
        self.inner = restated(original, self.layer.frame) or copy.copy(original)
        self.fusion = fusion_of(original, self.layer)
        self.by_backend = hasattr(original, "_attention_backend")
        self._dense_backend = getattr(original, "_attention_backend", None)
        self._dispatch = private.dispatcher()
        if self.by_backend:
            self.inner._attention_backend = private.ensure_backend(foveal_backend)
        self.mode = None if self.by_backend else _Intercept(self)
        self.ticket = self.layer.ticket

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    # ---- diffusers assigns these two on processors that have them
    @property
    def _attention_backend(self) -> Any:
        return self._dense_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        ours = getattr(value, "value", value) == private.BACKEND
        self._dense_backend = None if ours else value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        if value is not None:
            raise AccelerateError(NO_CONTEXT_PARALLEL)

    # ---- the call
    def attend(self, core: Core) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.layer.attend(core)
        if core.causal or core.dropout:
            return self.dense(core)
        return attend_in_graph(core.q, core.k, core.v, core.mask, self.ticket, core.scale, core.gqa)

    def dense(self, core: Core) -> Tensor:
        """What the model would have computed without us, by the same route. -> [B, N, H, D]"""
        options: dict[str, Any] = {"attn_mask": core.mask, "dropout_p": core.dropout, "is_causal": core.causal}
        options |= {"scale": core.scale, "enable_gqa": core.gqa}
        if not self.by_backend:
            q, k, v = (x.transpose(1, 2) for x in core[:3])
            return SDPA(q, k, v, **options).transpose(1, 2)
        previous, _SLOT.bound = _SLOT.bound, None
        try:
            return self._dispatch(*core[:3], **options, backend=self._dense_backend)
        finally:
            _SLOT.bound = previous

    def run(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fusion is None or torch.compiler.is_compiling():
            return self.run_original(attn, *args, **kwargs)
        try:
            out = self.fusion.run(attn, *args, **kwargs)
            return self.run_original(attn, *args, **kwargs) if out is None else out
        finally:
            self.layer.handed_back = None

    def run_original(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Through the processor that the layer had, with its attention call caught."""
        if self.mode is not None:
            with self.mode:
                return self.inner(attn, *args, **kwargs)
        previous, _SLOT.bound = _SLOT.bound, self
        try:
            return self.inner(attn, *args, **kwargs)
        finally:
            _SLOT.bound = previous


@functools.cache
def bound_class(original: type) -> type[BoundProcessor]:
    """The subclass for one processor class. Attention modules read the signature of ``__call__`` and drop what it does not name."""

    def __call__(self: BoundProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(attn, *args, **kwargs)

    # Not a ready __signature__: the compiler refuses the read-only view in it once the model's graph has changed any dict.
    __call__.__wrapped__ = original.__call__  # type: ignore[attr-defined]
    cls = type("Foveal" + original.__name__, (BoundProcessor,), {"__call__": __call__})
    private.register_processor_class(cls, original)
    return cls
