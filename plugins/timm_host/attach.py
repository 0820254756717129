"""One ViT entered: its layers patched, its root followed, and the way back.

* Layers are found by structure and chosen by ``layers``. What was found and cannot be taken over is named in the record, with why.
* The attachment lives on the model itself, so that a second ``accelerate`` finds the first.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from foveal.plugins.accelerate import AccelerateError, Layers
from foveal.plugins.method import Method
from foveal.plugins.record import Record
from foveal.plugins.running import select
from foveal.plugins.timm_host.layer import Layer
from foveal.plugins.timm_host.patch import attention_class, held_by, put_on, root_class, take_off
from foveal.plugins.timm_host.recognise import POOL, attention_modules, embedding, original_class, why_not
from foveal.plugins.timm_host.root import Root

NO_STEPS = "dense_steps counts denoising steps, which a vision model does not have, so it is ignored."
NOTHING = "it has no attention layers that can be recognised (num_heads, and projections to q, k and v)"


def attached(model: nn.Module) -> Attachment | None:
    """The attachment a model carries now."""
    return held_by(model)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A patched module and its layer."""

    module: nn.Module
    layer: Layer


class Attachment:
    """What was done to one ViT; ``remove()`` undoes it to the bit."""

    def __init__(self, model: nn.Module, component: str, method: Method, record: Record) -> None:
        self.model, self.component, self.method, self.record = model, component, method, record
        self.handle: Any = None
        self.bound: dict[str, Bound] = {}
        self._first_call = True

    # ---- entering
    def choose(self, layers: Layers, roles: Sequence[str]) -> None:
        """Choose the layers; raises ``AccelerateError`` before anything is touched."""
        where = f"{self.component} ({self._kind})" if self.component else self._kind
        if "self" not in roles:
            raise AccelerateError(f"{where} has self-attention only; roles={tuple(roles)!r} leaves none of it.")
        reasons = {name: why_not(module) for name, module in attention_modules(self.model).items()}
        self.left = {name: why for name, why in reasons.items() if why is not None and layers is None}
        self.recognised = [name for name, why in reasons.items() if why is None]
        if not self.recognised:
            raise AccelerateError(f"{where} is left as it is: {grouped(self.model, reasons)}.")
        self.chosen = select(self.recognised, layers, where)

    @property
    def _kind(self) -> str:
        return original_class(self.model).__name__

    def enter(self) -> None:
        """Patch the chosen layers; an attachment the model already has goes first."""
        old = attached(self.model)
        if old is not None:
            old.handle.release(old)
        method = self._without_steps()
        self._fit(method)
        self.root = Root(self.model, self.component, method, self.record, set(self.recognised))
        self.root.after_call = self._check_first_call
        label = self.method.label
        for index, name in enumerate(self.chosen):
            module: Any = self.model.get_submodule(name)
            row = self.record.add_layer(self.component, name, "self", index, label)
            fused = bool(getattr(module, "fused_attn", False))
            layer = Layer(name, index, len(self.chosen), method, self.root, self.record, row, fused)
            self.bound[name] = Bound(module, layer)
            put_on(module, attention_class(original_class(module)), layer)
        for name, why in self.left.items():
            role = "pool" if why == POOL else "unknown"
            self.record.add_layer(self.component, name, role, len(self.record.layers), label).left_alone = why
        put_on(self.model, root_class(original_class(self.model)), self)

    def _without_steps(self) -> Method:
        if not self.method.dense_steps:
            return self.method
        self.record.note(NO_STEPS)
        method = dataclasses.replace(self.method)
        object.__setattr__(method, "dense_steps", 0)
        return method

    def _fit(self, method: Method) -> None:
        """Knobs that do not fit the one grid a model takes are refused now, not at the first picture."""
        embed: Any = embedding(self.model)
        grid = getattr(embed, "grid_size", None)
        if grid is None or not getattr(embed, "strict_img_size", False):
            return
        if self.model.num_prefix_tokens + grid[0] * grid[1] >= method.min_tokens:
            method.order((1, *grid))

    # ---- while it runs
    def new_run(self) -> None:
        """Forget what methods kept."""
        for bound in self.bound.values():
            bound.layer.states.clear()

    def _check_first_call(self) -> None:
        """A patched layer that was never asked is a layer we did not catch."""
        if not self._first_call:
            return
        self._first_call = False
        silent = [name for name in self.still_bound() if not self.bound[name].layer.seen]
        if silent and not self.record.ran_dense_why():
            sentence = f"{len(silent)} layers of {self._kind} made no attention call: {', '.join(silent)}."
            self.record.note(sentence)
            warnings.warn(sentence, stacklevel=2)

    def still_bound(self) -> list[str]:
        """Names of the layers that are still ours: another module may have taken their place."""
        modules = dict(self.model.named_modules())
        return [n for n, b in self.bound.items() if modules.get(n) is b.module and held_by(b.module) is b.layer]

    @property
    def order_hook(self) -> Root:
        """Its ``enabled`` says whether tokens may be permuted once per call."""
        return self.root

    def parameters(self) -> dict[str, Tensor]:
        """Learned parts of the method for this model."""
        return dict(self.method.parameters(self.model))

    # ---- leaving
    def remove(self) -> None:
        """Give every module its class back."""
        for bound in self.bound.values():
            if held_by(bound.module) is bound.layer:
                take_off(bound.module)
        if attached(self.model) is self:
            take_off(self.model)
        self.bound = {}


def grouped(model: nn.Module, reasons: Mapping[str, str | None]) -> str:
    """ "A (4 layers): it ...; B (2 layers): it ..." """
    counts = Counter((original_class(model.get_submodule(name)).__name__, why) for name, why in reasons.items() if why)
    parts = [f"{kind} ({n} layers): {why}" for (kind, why), n in counts.items()]
    return "; ".join(parts) or NOTHING
