"""What can be seen of a model without knowing its name: the arguments of its forward, its config, its attention layers.

* A forward that passes ``*args`` or ``**kwargs`` on hides its arguments; the classes it inherits from are read as well, up to the
  first that shows all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveal.plugins.diffusers_host import private

HIDDEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Structure:
    """forward: argument names; config: keys; layers: qualified names of the attention modules, in module order; bases: class names."""

    name: str
    bases: tuple[str, ...]
    forward: frozenset[str]
    config: frozenset[str]
    layers: tuple[str, ...]

    @property
    def denoises(self) -> bool:
        """Does the forward take a time? An autoencoder's does not."""
        return any(name == "t" or name.startswith("timestep") for name in self.forward)


def structure_of(model: nn.Module) -> Structure:
    kind = type(model)
    return Structure(
        name=kind.__name__,
        bases=tuple(base.__name__ for base in kind.__mro__),
        forward=frozenset(p.name for p in parameters_of(kind)),
        config=_config_keys(getattr(model, "config", None)),
        layers=tuple(attention_layers(model)),
    )


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Attention modules that have a processor, by qualified name, as diffusers itself finds them."""
    classes = private.attention_classes()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, classes) and getattr(module, "processor", None) is not None
    }


def parameters_of(kind: type) -> list[inspect.Parameter]:
    """Parameters of a module class's forward, those behind ``*args`` and ``**kwargs`` included; without ``self``."""
    seen: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        forward = base.__dict__.get("forward")
        if forward is None:
            continue
        own = list(inspect.signature(forward).parameters.values())[1:]
        for parameter in own:
            if parameter.kind not in HIDDEN:
                seen.setdefault(parameter.name, parameter)
        if all(parameter.kind not in HIDDEN for parameter in own):
            break
    return list(seen.values())


def _config_keys(config: Any) -> frozenset[str]:
    return frozenset(config if isinstance(config, Mapping) else getattr(config, "__dict__", {}))
