"""The handle: one method in one pipeline or model, and everything the user may ask of it. Every host gives the same one.

A host puts attachments into it, one per model: component, bound (by name, each with its ``layer``), order_hook, still_bound(),
new_run(), parameters(), remove().
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from foveal.plugins.accelerate import Layers, accelerate
from foveal.plugins.method import Method
from foveal.plugins.record import Record
from foveal.plugins.site import State
from foveal.plugins.summary import Summary


class Handle:
    """A method at work in a pipeline or model. As a context manager it removes itself.

    method     the Method
    record     what ran: times, densities, reasons (see ``Record``)
    settings   plain data: ``foveal.accelerate(target, **handle.settings)`` does the same again
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.settings: dict[str, Any] = {}
        self.record = Record()
        self.attachments: list[Any] = []
        self.undo: list[Callable[[], None]] = []  # what a host did outside its attachments, taken back last

    def enter(self, attachments: Sequence[Any], layers: Layers, roles: Sequence[str] | None) -> None:
        """Enter every model, all or nothing: layers are chosen in all of them before the first is touched."""
        for attachment in attachments:
            attachment.choose(layers, tuple(self.method.roles if roles is None else roles))
        try:
            for attachment in attachments:
                attachment.handle = self
                self.attachments.append(attachment)
                attachment.enter()
        except BaseException:
            self.remove()
            raise
        self.settings = self._settings(layers, roles)

    def _settings(self, layers: Layers, roles: Sequence[str] | None) -> dict[str, Any]:
        """A predicate cannot be written down, so the names it chose are."""
        plain: Any = layers
        if callable(layers):
            plain = sorted({name for a in self.attachments for name in a.bound})
        elif layers is not None and not isinstance(layers, str):
            plain = list(layers)
        knobs = self.method.knobs()
        return {"method": self.method.name, "layers": plain, "roles": None if roles is None else list(roles), **knobs}

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

    @property
    def fused(self) -> bool:
        """May queries and keys be normed and rotated in one kernel, where it applies? False leaves that to the model's own operations."""
        return any(getattr(a, "fused", False) for a in self.attachments)

    @fused.setter
    def fused(self, enabled: bool) -> None:
        for attachment in self.attachments:
            if hasattr(attachment, "fused"):
                attachment.fused = enabled

    # ---- acting
    def reset(self) -> None:
        """Start afresh: states, step counts and the record."""
        for attachment in self.attachments:
            attachment.new_run()
        self.record.reset()

    def release(self, attachment: Any) -> None:
        """Let go of one model, because another handle takes it over."""
        attachment.remove()
        self.attachments.remove(attachment)
        if not self.attachments:
            self.remove()

    def remove(self) -> None:
        """Restore every bit: the original processors, no hooks, no wrapped scheduler. May be called again."""
        for attachment in self.attachments:
            attachment.remove()
        for undo in self.undo:
            undo()
        self.attachments, self.undo = [], []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({self.method.label}, {len(self.still_bound())} layers)"
