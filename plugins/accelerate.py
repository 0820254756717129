"""The front door of the plugins: ``accelerate(target, method, **knobs)`` finds the host that knows the target.

* A host is imported only when its library is: a target made by diffusers proves that diffusers is loaded, so nothing heavy is
  imported to refuse a target.
* Every refusal is one sentence that says what was given, what is supported and what to do.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from foveal.plugins.method import Method, make, suggest

if TYPE_CHECKING:
    from foveal.plugins.handle import Handle

Layers = Callable[[str], bool] | Sequence[int] | Sequence[str] | str | None
SUPPORTED = (
    "a diffusers pipeline (its transformer, transformer_2 or unet), a diffusers model, or a timm vision transformer"
)


class AccelerateError(ValueError):
    """A target, method or combination that cannot work, in one sentence."""


def accelerate(
    target: Any,
    method: str | Method | type[Method],
    *,
    layers: Layers = None,
    roles: Sequence[str] | None = None,
    **knobs: Any,
) -> Handle:
    """Let a method take over the attention of a model. -> Handle (a context manager; ``remove()`` restores every bit).

    target   a diffusers pipeline (transformer, transformer_2 and unet are entered) or model, a timm vision transformer, or a
             module that holds one
    method   a registered name ("grat", "neighborhood", ...), a Method, or a Method class
    layers   which attention layers: None (all of the roles), indices (negative counts from the end), name patterns
             ("blocks.[0-9].attn1"), or a function of the qualified name
    roles    which kinds of attention; default: the method's own, ("self", "joint"). Cross-attention is never included by default
    knobs    the method's knobs

    A second call on the same model replaces the first; the originals stay those of the first.
    Raises ``AccelerateError`` (nothing to accelerate, unsupported library version) and ``MethodError`` (unknown method or knob).
    """
    chosen = resolve(method, knobs)
    if _from_diffusers(target):
        from foveal.plugins.diffusers_host.handle import open_handle

        return open_handle(target, chosen, layers=layers, roles=roles)
    if _from_timm(target):
        from foveal.plugins.timm_host.handle import open_handle as open_vision_handle

        return open_vision_handle(target, chosen, layers=layers, roles=roles)
    raise AccelerateError(_refusal(target))


def handle_of(target: Any) -> Handle | None:
    """The handle that now accelerates a pipeline or model, or None: the way back after ``set_attn_processor``."""
    if _from_diffusers(target):
        from foveal.plugins.diffusers_host.handle import find_handle

        return find_handle(target)
    if _from_timm(target):
        from foveal.plugins.timm_host.handle import find_handle as find_vision_handle

        return find_vision_handle(target)
    return None


def resolve(method: str | Method | type[Method], knobs: dict[str, Any]) -> Method:
    """A name, a Method class or a Method, plus knobs -> Method."""
    if isinstance(method, str):
        return make(method, **knobs)
    if isinstance(method, Method):
        _check_knobs(type(method), knobs)
        return dataclasses.replace(method, **knobs) if knobs else method
    if isinstance(method, type) and issubclass(method, Method):
        _check_knobs(method, knobs)
        return method(**knobs)
    raise AccelerateError(
        f"{method!r} is no method; give a registered name such as 'grat', a Method, or a Method class."
    )


def _check_knobs(cls: type[Method], knobs: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for knob in knobs:
        if knob not in known:
            raise AccelerateError(
                f"{cls.name or cls.__name__} has no knob {knob!r}{suggest(knob, known)}; its knobs are {', '.join(known)}."
            )


def _from_diffusers(target: Any) -> bool:
    if "diffusers" not in sys.modules:
        return False
    from foveal.plugins.diffusers_host.private import is_model, is_pipeline

    return is_pipeline(target) or is_model(getattr(target, "_orig_mod", target))


def _from_timm(target: Any) -> bool:
    if "timm" not in sys.modules:
        return False
    model = getattr(target, "_orig_mod", target)
    if any(cls.__module__.split(".")[0] == "timm" for cls in type(model).__mro__):
        return True
    from foveal.plugins.timm_host.recognise import roots

    return isinstance(model, nn.Module) and bool(roots(model))


def _refusal(target: Any) -> str:
    given = f"{type(target).__module__}.{type(target).__qualname__}"
    return f"there is nothing to accelerate in a {given}; give {SUPPORTED}."
