"""The root of a model, followed: which step, which guidance branch, which pass, which grid.

* Steps come from the pipeline's cache context, else from the scheduler's step index, else from counting model calls per context:
  always host integers. Timesteps are device tensors and are never read.
* A run starts when the scheduler sets its timesteps, when diffusers resets its caches, or when the step goes backwards.
* The hook is never traced: host bookkeeping inside a compiled graph would compile again at every step.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.plugins.accelerate import AccelerateError
from foveal.plugins.clock import Mark, start_clock, stop_clock
from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.caches import refusal
from foveal.plugins.diffusers_host.composition import COMPILE_FIRST, NO_CONTEXT_PARALLEL
from foveal.plugins.diffusers_host.grid import Layout, nothing
from foveal.plugins.diffusers_host.placing import Placing
from foveal.plugins.diffusers_host.structure import parameters_of

if TYPE_CHECKING:
    from foveal.plugins.diffusers_host.attach import Attachment

MOST_PASSES = 3  # passes without a context that are told apart


@dataclass
class Frame:
    """Facts that hold for every layer of one model call."""

    layout: Layout = field(default_factory=nothing)
    step: int = 0
    steps: int | None = None
    branch: str | None = None
    valid_text: Tensor | None = None  # int32 [B] on the device
    kept: Tensor | None = None  # [layout.text]: its length is dynamic to compilers, a number would be constant
    ordered: bool = False  # the order hook has permuted this call
    active: bool = False  # a model call is under way
    fused: bool = True  # queries and keys may be finished by our kernel


class _Now(threading.local):
    """The frame of the model call under way in this thread, for traced code: what is reached through a module counts as constant."""

    def __init__(self) -> None:
        self.frame: Frame | None = None


NOW = _Now()


class Binder:
    """Positional and keyword arguments -> dict by name, without inspecting the signature at every call."""

    def __init__(self, parameters: Sequence[inspect.Parameter]) -> None:
        self.names = [p.name for p in parameters]
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}


class Context(NamedTuple):
    """What a pipeline tells about a denoising call through ``cache_context``."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None


class Tracker:
    """Fills in an attachment's frame before every model call, and closes it after."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.bind = Binder(parameters_of(type(attachment.model)))
        self.placing = Placing(attachment.known)
        self.context: Context | None = None
        self.calls: dict[str | None, int] = {}
        self.scheduler: Callable[[], Any] = lambda: None
        self.run_steps: int | None = None
        self.bound = True  # does any layer still hold our processor in this run?
        self._last_step: int | None = None
        self._pass = 0
        self._mark: Mark = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """-> other arguments for the call, where the order hook has changed some"""
        attachment = self.attachment
        if module is not attachment.model:  # a deep copy keeps the hook, and is not accelerated
            return None
        call, frame = self.bind(args, kwargs), attachment.frame
        if not self.calls:  # the first call of a run warns when something has replaced our processors since
            attachment.handle.is_active()
            self.bound = bool(attachment.still_bound())
        self._follow_steps(frame)
        self._check_cache(call)
        self._place(frame, call)
        if self.bound:
            attachment.order_hook.begin(call, frame)
        else:  # nobody gains, and sums would be taken in another order
            frame.ordered = False
        frame.active = True
        NOW.frame = frame
        self._mark = start_clock(_device(call)) if attachment.record.timing else None
        changed = attachment.order_hook.arguments(call)
        return None if changed is None else ((), changed)

    def after(self, module: nn.Module) -> None:
        """Also when the call failed."""
        attachment = self.attachment
        if module is not attachment.model or not attachment.frame.active:
            return
        attachment.frame.active = False
        NOW.frame = None
        attachment.order_hook.end()
        attachment.record.ran_forward(attachment.component, attachment.frame.step, stop_clock(self._mark))
        self._mark = None
        attachment.check_first_call()

    def reset(self) -> None:
        """A new run starts."""
        self.calls.clear()
        self._last_step, self._pass = None, 0

    def _follow_steps(self, frame: Frame) -> None:
        context, scheduler = self.context, self.scheduler()
        name = None if context is None else context.name
        if context is not None and context.step_index is not None:
            step = int(context.step_index)
        elif hasattr(scheduler, "step_index"):  # a host integer, None until the run's first scheduler.step
            index = scheduler.step_index
            step = int(index if index is not None else getattr(scheduler, "begin_index", None) or 0)
        else:
            step = self.calls.get(name, 0)
        self.calls[name] = self.calls.get(name, 0) + 1
        if self._last_step is not None and step < self._last_step:
            self.attachment.new_run(keep_calls=True)
        self._pass = self._pass + 1 if step == self._last_step else 0
        self._last_step = frame.step = step
        told = None if context is None else context.num_inference_steps
        frame.steps = int(told) if told is not None else self.run_steps
        unnamed = f"pass{min(self._pass, MOST_PASSES)}" if self._pass else None
        frame.branch = unnamed if name is None else name

    def _check_cache(self, call: dict[str, Any]) -> None:
        """Raise where diffusers' step cache would mix guidance passes up."""
        config = getattr(self.attachment.model, "_cache_config", None)
        several = self._pass > 0 or len(self.calls) > 1
        why = refusal(config, call, several, None if self.context is None else self.context.name)
        if why is not None:
            raise AccelerateError(why)

    def _place(self, frame: Frame, call: dict[str, Any]) -> None:
        """Where the tokens of this call lie, and how much of its text is real."""
        placing, model = self.placing, self.attachment.model
        frame.layout = layout = placing.layout(model, call)
        frame.valid_text = None if layout.grid is None else placing.valid_text(call, _device(call))
        text = layout.text if placing.family == "HunyuanVideo" else None
        frame.kept = None if text is None else torch.empty(text)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a function out of compiled graphs, with our reason in the compiler's message."""
    return torch.compiler.disable(function, reason=COMPILE_FIRST)


def follow(tracker: Tracker, target: nn.Module, model: nn.Module) -> list[Callable[[], Any]]:
    """Put the hooks in; -> what takes them out. target: the model, or the compiled wrapper around it.

    PyTorch's own hooks see the calls: diffusers' hook registry replaces ``forward``, which offloading takes away again.
    """
    before, after = untraced(tracker.before), untraced(tracker.after)
    hooks = (
        target.register_forward_pre_hook(lambda _, args, kwargs: before(_inner(_), args, kwargs), with_kwargs=True),
        target.register_forward_hook(lambda _, args, out: after(_inner(_)), always_call=True),
    )
    undo: list[Callable[[], Any]] = [hook.remove for hook in hooks]
    wrappers: dict[str, type[_Wrapper]] = {
        "cache_context": _CacheContext, "_reset_stateful_cache": _ResetStatefulCache, "enable_parallelism": _EnableParallelism
    }  # fmt: skip
    for name, wrapper in wrappers.items():
        if hasattr(model, name):
            undo.append(_override(model, name, wrapper(tracker, getattr(model, name))))
    return undo


class _Wrapper:
    """Stands for a method of one model. A deep copy of the model gets the plain method back."""

    def __init__(self, tracker: Tracker, original: Callable[..., Any]) -> None:
        self.tracker, self.original = tracker, original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)


class _CacheContext(_Wrapper):
    """``model.cache_context``: pipelines name the guidance branch with it."""

    @contextmanager
    def __call__(self, name: str, **facts: Any) -> Iterator[None]:
        previous = self.tracker.context
        with self.original(name, **facts):
            self.tracker.context = Context(name, facts.get("step_index"), facts.get("num_inference_steps"))
            try:
                yield
            finally:
                self.tracker.context = previous


class _ResetStatefulCache(_Wrapper):
    """``model._reset_stateful_cache``: pipelines end with it."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.original(*args, **kwargs)
        self.tracker.attachment.new_run()


class _EnableParallelism(_Wrapper):
    """``model.enable_parallelism``: refused before it has changed anything, where tokens would be split."""

    def __call__(self, *, config: Any, **options: Any) -> None:
        if private.splits_tokens(config):
            raise AccelerateError(NO_CONTEXT_PARALLEL)
        self.original(config=config, **options)


def _override(model: nn.Module, name: str, wrapper: _Wrapper) -> Callable[[], None]:
    model.__dict__[name] = wrapper

    def undo() -> None:
        if model.__dict__.get(name) is wrapper:
            del model.__dict__[name]

    return undo


def _inner(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _device(call: dict[str, Any]) -> torch.device:
    """Where a model call computes: its inputs are there, whatever offloading does with the weights."""
    flat = (y for x in call.values() for y in (x if isinstance(x, (list, tuple)) else (x,)))
    return next((x.device for x in flat if isinstance(x, Tensor)), torch.device("cpu"))
