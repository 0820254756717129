"""The handle: one method in one pipeline or model, and everything the user may ask of it."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from foveal.plugins.accelerate import AccelerateError, Layers, accelerate
from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.attach import Attachment, attached
from foveal.plugins.diffusers_host.summary import Summary
from foveal.plugins.method import Method
from foveal.plugins.record import Record
from foveal.plugins.site import State

COMPONENTS = ("transformer", "transformer_2", "unet")


class Handle:
    """A method at work in a pipeline or model. As a context manager it removes itself.

    method     the Method
    record     what ran: times, densities, reasons (see ``Record``)
    settings   plain data: ``foveal.accelerate(target, **handle.settings)`` does the same again
    """

    def __init__(self, method: Method, settings: dict[str, Any]) -> None:
        self.method, self.settings = method, settings
        self.record = Record()
        self.attachments: list[Attachment] = []
        self._follow: _SchedulerFollower | None = None

    @classmethod
    def from_settings(cls, target: Any, settings: Mapping[str, Any] | str) -> Handle:
        """Accelerate a target as another handle did. settings: its ``settings`` or ``to_json()``."""
        return accelerate(target, **(json.loads(settings) if isinstance(settings, str) else settings))

    def to_json(self) -> str:
        return json.dumps(self.settings)

    # ---- asking
    def summary(self) -> Summary:
        """Per layer: method, kernel, density, time share, and what ran dense and why. Prints as text and through rich."""
        bound, total = len(self.still_bound()), len(self.record.layers)
        notes = list(self.record.notes)
        if bound < sum(len(a.bound) for a in self.attachments):
            notes.append(self._replaced())
        return Summary(self.record, self.method.label, bound, total, tuple(notes))

    def still_bound(self) -> list[str]:
        """Qualified names of the layers that still hold our processor."""
        return [f"{a.component}.{n}" if a.component else n for a in self.attachments for n in a.still_bound()]

    def is_active(self) -> bool:
        """Does every layer still hold our processor? Warns when something has replaced some of them."""
        expected, bound = sum(len(a.bound) for a in self.attachments), len(self.still_bound())
        if expected and bound < expected:
            warnings.warn(self._replaced(), stacklevel=2)
        return bool(expected) and bound == expected

    def _replaced(self) -> str:
        expected, bound = sum(len(a.bound) for a in self.attachments), len(self.still_bound())
        return f"{expected - bound} of {expected} layers hold another processor now; call foveal.accelerate again after whatever replaced them."

    @property
    def state(self) -> dict[tuple[str, str | None], State]:
        """What the method keeps now, by qualified layer name and guidance branch."""
        rows = [bound.layer for a in self.attachments for bound in a.bound.values()]
        return {(layer.row.qualified, branch): state for layer in rows for branch, state in layer.states.items()}

    def state_bytes(self) -> int:
        """Memory held by the method's states."""
        return sum(state.bytes() for state in self.state.values())

    def parameters(self) -> dict[str, Tensor]:
        """Learned parts of the method, by component and name."""
        return {
            f"{a.component}.{k}" if a.component else k: v for a in self.attachments for k, v in a.parameters().items()
        }

    @property
    def order_hook(self) -> bool:
        """May tokens be permuted once per model call? False leaves the order to every attention call; results are the same."""
        return all(a.order_hook.enabled for a in self.attachments)

    @order_hook.setter
    def order_hook(self, enabled: bool) -> None:
        for attachment in self.attachments:
            attachment.order_hook.enabled = enabled

    # ---- acting
    def reset(self) -> None:
        """Start afresh: states, step counts and the record."""
        for attachment in self.attachments:
            attachment.new_run()
        self.record.reset()

    def release(self, attachment: Attachment) -> None:
        """Let go of one model, because another handle takes it over."""
        attachment.remove()
        self.attachments.remove(attachment)
        if not self.attachments:
            self.remove()

    def remove(self) -> None:
        """Restore every bit: the original processors, no hooks, no wrapped scheduler. May be called again."""
        for attachment in self.attachments:
            attachment.remove()
        if self._follow is not None:
            self._follow.remove()
        self.attachments, self._follow = [], None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({self.method.label}, {len(self.still_bound())} layers)"


class _SchedulerFollower:
    """A run starts when the pipeline's scheduler sets its timesteps. Follows the scheduler the pipeline holds at each call."""

    def __init__(self, pipe: Any, attachments: list[Attachment]) -> None:
        self.pipe, self.attachments = pipe, attachments
        self.scheduler: Any = None
        self._wrapped: Any = None
        self.current()

    def current(self) -> Any:
        """The pipeline's scheduler, followed from now on if it is a new one."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is not self.scheduler:
            self.remove()
            if hasattr(scheduler, "set_timesteps"):
                self._wrap(scheduler)
        return scheduler

    def _wrap(self, scheduler: Any) -> None:
        original = scheduler.set_timesteps

        @functools.wraps(original)  # pipelines inspect this signature
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._wrapped is set_timesteps:
                for attachment in self.attachments:
                    attachment.new_run()
                    attachment.tracker.run_steps = len(scheduler.timesteps)
            return result

        self.scheduler, self._wrapped = scheduler, set_timesteps
        scheduler.set_timesteps = set_timesteps

    def remove(self) -> None:
        if self.scheduler is not None and self.scheduler.__dict__.get("set_timesteps") is self._wrapped:
            del self.scheduler.set_timesteps
        self.scheduler = self._wrapped = None


def open_handle(target: Any, method: Method, *, layers: Layers = None, roles: Sequence[str] | None = None) -> Handle:
    """Enter every denoiser of a pipeline, or one model; all or nothing."""
    private.require_contract()
    handle = Handle(method, {})
    found = [Attachment(model, component, method, handle.record) for component, model in parts(target)]
    for attachment in found:
        attachment.choose(layers, tuple(method.roles if roles is None else roles))
    try:
        for attachment in found:
            attachment.handle = handle
            handle.attachments.append(attachment)
            attachment.enter()
    except BaseException:
        handle.remove()
        raise
    handle.settings = _settings(handle, layers, roles)
    if private.is_pipeline(target):
        handle._follow = _SchedulerFollower(target, handle.attachments)
        for attachment in handle.attachments:
            attachment.tracker.scheduler = handle._follow.current
    return handle


def find_handle(target: Any) -> Handle | None:
    for _, model in parts(target):
        attachment = attached(getattr(model, "_orig_mod", model))
        if attachment is not None:
            return attachment.handle
    return None


def parts(target: Any) -> list[tuple[str, nn.Module]]:
    """(component name, model) pairs: the denoisers of a pipeline, or the model itself under an empty name."""
    if not private.is_pipeline(target):
        return [("", target)]
    parts = [(name, getattr(target, name, None)) for name in COMPONENTS]
    found = [(name, model) for name, model in parts if isinstance(model, nn.Module)]
    if not found:
        raise AccelerateError(f"{type(target).__name__} has none of {', '.join(COMPONENTS)}; give the model itself.")
    return found


def _settings(handle: Handle, layers: Layers, roles: Sequence[str] | None) -> dict[str, Any]:
    """A predicate cannot be written down, so the names it chose are."""
    plain: Any = layers
    if callable(layers):
        plain = sorted({name for a in handle.attachments for name in a.bound})
    elif layers is not None and not isinstance(layers, str):
        plain = list(layers)
    knobs = handle.method.knobs()
    return {"method": handle.method.name, "layers": plain, "roles": None if roles is None else list(roles), **knobs}
