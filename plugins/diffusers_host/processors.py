"""Attention processors the diffusers way: ``model.set_attn_processor(GRATAttnProcessor(group=(1, 16, 16)))``.

* A processor here is a template: diffusers would put one object on every layer, cross-attention included, and forget the
  originals. ``set_attn_processor`` (see install.py) recognises it and accelerates the model with its method instead.
* Importing this file teaches diffusers the line: Python looks the method up before it makes the processor, so making one would be
  too late.
* Afterwards ``foveal.handle_of(model)`` gives the handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from foveal.plugins.accelerate import AccelerateError, Layers, resolve
from foveal.plugins.diffusers_host.install import install
from foveal.plugins.method import Method
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood


class AttnProcessor:
    """A method in the shape of a diffusers attention processor.

    layers, roles: as ``foveal.accelerate`` takes them. knobs: the method's.
    """

    method_class: ClassVar[type[Method]]

    def __init__(self, *, layers: Layers = None, roles: Sequence[str] | None = None, **knobs: Any) -> None:
        self.method = resolve(self.method_class, knobs)
        self.layers, self.roles = layers, roles

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AccelerateError(
            f"{type(self).__name__} is a template and cannot run by itself; import it by name before the call to "
            "set_attn_processor (from foveal import ...), or call foveal.accelerate."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method.label})"


def processor_class(method: type[Method]) -> type[AttnProcessor]:
    """The processor class of a method: GRAT -> GRATAttnProcessor."""
    name = f"{method.__name__}AttnProcessor"
    return type(
        name,
        (AttnProcessor,),
        {"method_class": method, "__doc__": f"{method.summary or method.__name__} {AttnProcessor.__doc__}"},
    )


GRATAttnProcessor = processor_class(GRAT)
NeighborhoodAttnProcessor = processor_class(Neighborhood)

install()
