"""What an attention layer is for: by the family of its model, by the module itself, and for models of no family by the module alone.

* diffusers has no reliable mark of its own: ``is_cross_attention`` exists on some classes only, where it overrules the family's
  rule (UNets may make ``attn1`` a cross-attention and ``attn2`` a self-attention), and CogVideoX calls joint attention ``attn1``.
* A layer that matches nothing is "unknown" and left alone.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from foveal.plugins.diffusers_host.families import REFINER, Known, recognise
from foveal.plugins.diffusers_host.structure import attention_layers

MOTION = "motion modules attend over the few frames of one pixel, where nothing can be left out"
NATIVE = "native"
LINEAR = "linear attention compares no pairs of tokens, so there are none to leave out"


def roles_of(model: nn.Module, known: Known | None = None) -> dict[str, str]:
    """Role of every attention module by qualified name: "self", "joint", "cross", "text", "temporal", ... or "unknown"."""
    known = known or recognise(model)
    return {name: _role(known, name, module) for name, module in attention_layers(model).items()}


def left_alone(processor: Any) -> str | None:
    """Why the attention of a processor cannot be taken over, or None. That it is linear, only class names tell."""
    backends = getattr(processor, "_SUPPORTED_BACKENDS", None)  # such a processor refuses every other backend, ours too
    if backends is not None and NATIVE not in backends:
        return f"its processor takes the attention backend {backends[0]} only"
    return LINEAR if any("Linear" in base.__name__ for base in type(processor).__mro__) else None


def _role(known: Known, name: str, module: Any) -> str:
    if known.family is None:
        return _by_module(name, module) if known.structure.denoises else "unknown"
    role = known.family.role(name)
    crosses = getattr(module, "is_cross_attention", None)
    if role not in ("self", "cross") or crosses is None:
        return role
    return "cross" if crosses else "self"


def _by_module(name: str, module: Any) -> str:
    """In a model of no family everything runs dense; the role says which layers the summary is about."""
    if re.search(REFINER[0], name):
        return "text"
    if getattr(module, "is_cross_attention", False):
        return "cross"
    return "joint" if getattr(module, "add_k_proj", None) is not None else "self"
