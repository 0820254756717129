"""One model entered: its layers bound, its root followed, its order hook in place, and the way back.

* Layers are found as diffusers finds them (by attention class) and chosen by role first, then by ``layers``.
* A processor with weights of its own (an IP adapter) is left alone, and the record says so: wrapped, its weights would vanish from
  the model's state.
* The attachment lives on the model itself, so that a second ``accelerate`` finds the first and the originals stay the first ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from foveal.plugins.accelerate import AccelerateError, Layers
from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.bound import BoundProcessor, bound_class
from foveal.plugins.diffusers_host.composition import NO_CONTEXT_PARALLEL, OWN_WEIGHTS
from foveal.plugins.diffusers_host.families import recognise
from foveal.plugins.diffusers_host.layer import Layer, order_on_level
from foveal.plugins.diffusers_host.levels import watch_levels
from foveal.plugins.diffusers_host.order_hook import OrderHook
from foveal.plugins.diffusers_host.order_recipes import LEVELS
from foveal.plugins.diffusers_host.roles import MOTION, left_alone, roles_of
from foveal.plugins.diffusers_host.root_hook import Frame, Tracker, follow
from foveal.plugins.method import Method
from foveal.plugins.order import Order
from foveal.plugins.record import Record
from foveal.plugins.running import select
from foveal.plugins.site import Grid

KEY = "_foveal"


def attached(model: nn.Module) -> Attachment | None:
    """The attachment a model carries now."""
    return model.__dict__.get(KEY)


class Attachment:
    """What was done to one model; ``remove()`` undoes it to the bit."""

    def __init__(self, target: nn.Module, component: str, method: Method, record: Record) -> None:
        self.compiled = target if hasattr(target, "_orig_mod") else None
        self.model: nn.Module = getattr(target, "_orig_mod", target)
        self.component, self.method, self.record = component, method, record
        self.frame = Frame()
        self.handle: Any = None
        self.known = recognise(self.model)
        self.bound: dict[str, BoundProcessor] = {}
        self._undo: list[Callable[[], Any]] = []
        self._first_call = True

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model is not accelerated

    # ---- entering
    def choose(self, layers: Layers, roles: Sequence[str]) -> None:
        """Choose the layers; raises ``AccelerateError`` before anything is touched."""
        if private.context_parallel(self.model):
            raise AccelerateError(NO_CONTEXT_PARALLEL)
        backend, family = private.active_backend(), self.known.family
        if family is not None and family.name == "Cosmos" and "native" not in backend:
            raise AccelerateError(
                f"Cosmos follows the process-wide attention backend, which is {backend!r}; set it to 'native' first."
            )
        found = roles_of(self.model, self.known)
        self.chosen = choose_layers(self.model, self.component, found, layers, roles)
        motion = layers is None and "temporal" not in roles
        self.motion = [name for name, role in found.items() if motion and role == "temporal"]

    def enter(self) -> None:
        """Bind the chosen layers; an attachment the model already has goes first, with its originals restored."""
        old = attached(self.model)
        if old is not None:
            old.handle.release(old)
        self.order_hook = OrderHook(self.model, self.method.order, self.record.note)
        self._undo.append(self.order_hook.remove)
        self.tracker = Tracker(self)
        self._undo += follow(self.tracker, self.model if self.compiled is None else self.compiled, self.model)
        self._bind()
        if self.known.family is not None and self.known.family.has_levels:
            self._undo += watch_levels(self.model, [bound.layer for bound in self.bound.values()], self._order_level)
        self.model.__dict__[KEY] = self
        self._undo.append(partial(self.model.__dict__.pop, KEY, None))

    def _order_level(self, level: nn.Module) -> OrderHook:
        """A hook for one level of a UNet; it follows the switch of the whole model's."""

        def order(grid: Grid) -> Order | None:
            return order_on_level(self.method, grid) if self.order_hook.enabled and self.tracker.bound else None

        return OrderHook(level, order, self.record.note, LEVELS)

    def _bind(self) -> None:
        label, layers = self.method.label, len(self.chosen)
        for index, (name, role) in enumerate(self.chosen):
            module = self.model.get_submodule(name)
            original: Any = module.processor
            row = self.record.add_layer(self.component, name, role, index, label)
            row.left_alone = OWN_WEIGHTS if isinstance(original, nn.Module) else left_alone(original)
            if row.left_alone is not None:
                continue
            make = partial(Layer, name, role, index, layers, self.method, self.frame, self.record, row)
            kind: type = type(original)
            self.bound[name] = bound_class(kind)(original, make)
            set_processor(module, self.bound[name])
        for name in self.motion:
            self.record.add_layer(self.component, name, "temporal", len(self.record.layers), label).left_alone = MOTION

    # ---- while it runs
    @property
    def fused(self) -> bool:
        """May queries and keys be finished by our kernel, where it applies?"""
        return self.frame.fused

    @fused.setter
    def fused(self, enabled: bool) -> None:
        self.frame.fused = enabled

    def new_run(self, keep_calls: bool = False) -> None:
        """Forget what methods kept; ``keep_calls`` goes on counting model calls."""
        if not keep_calls:
            self.tracker.reset()
        for bound in self.bound.values():
            bound.layer.new_run()

    def check_first_call(self) -> None:
        """After the first model call: a bound layer that was never asked is a layer we did not catch."""
        if not self._first_call:
            return
        self._first_call = False
        layers = [self.bound[name].layer for name in self.still_bound()]
        silent = [layer.name for layer in layers if not layer.seen and layer.role in ("self", "joint")]
        if silent:
            sentence = f"{len(silent)} bound layers of {type(self.model).__name__} made no attention call: {', '.join(silent)}."
            self.record.note(sentence)
            warnings.warn(sentence, stacklevel=2)
        if self.frame.steps is None and isinstance(self.method.dense_steps, float) and 0 < self.method.dense_steps < 1:
            self.record.note(
                "dense_steps is a fraction, but the number of steps is unknown here, so no step ran dense; "
                "accelerate the pipeline, or give a number of steps."
            )

    def still_bound(self) -> list[str]:
        """Names of the layers that still hold our processor."""
        return [
            n for n, bound in self.bound.items() if getattr(self.model.get_submodule(n), "processor", None) is bound
        ]

    def parameters(self) -> dict[str, Tensor]:
        """Learned parts of the method for this model."""
        return dict(self.method.parameters(self.model))

    # ---- leaving
    def remove(self) -> None:
        """Restore the originals in the layers that still hold ours, and take every hook out."""
        for name in self.still_bound():
            set_processor(self.model.get_submodule(name), self.bound[name].original)
        for undo in reversed(self._undo):
            undo()
        self.bound, self._undo = {}, []


def choose_layers(
    model: nn.Module, component: str, found: dict[str, str], layers: Layers, roles: Sequence[str]
) -> list[tuple[str, str]]:
    """(qualified name, role) of the layers to bind, in module order. Raises ``AccelerateError`` when there are none."""
    where = f"{component} ({type(model).__name__})" if component else type(model).__name__
    of_role = [(name, role) for name, role in found.items() if role in roles]
    if not of_role:
        seen = ", ".join(sorted(set(found.values()))) or "no attention at all"
        raise AccelerateError(f"{where} has no attention layers of the roles {', '.join(roles)}; it has: {seen}.")
    chosen = set(select([name for name, _ in of_role], layers, where))
    return [(name, role) for name, role in of_role if name in chosen]


def set_processor(module: Any, processor: Any) -> None:
    """The module's own setter where it has one (Mochi's has none)."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor
