"""The patch: the class of one instance is replaced by a subclass that asks its layer or its root first.

* Weights, names, hooks and training flags stay where they are; taking the patch off gives the class back.
* A copy of an accelerated model (``copy.deepcopy``, pickle, an exponential moving average) is a plain model of the original classes.
* Compilers guard on the class of a module, so a graph made before the patch is never used under it, nor the other way round.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveal.plugins.accelerate import AccelerateError
from foveal.plugins.timm_host.compiled import attend_in_graph
from foveal.plugins.timm_host.frame import NOW
from foveal.plugins.timm_host.recognise import original_class
from foveal.plugins.timm_host.restated import Core, finish, project
from foveal.plugins.timm_host.root import NO_SCRIPT, refuse_tracing

KEY = "_foveal"


def put_on(module: nn.Module, kind: type, held: Any) -> None:
    """Make ``module`` an instance of a patched class, with what that class asks."""
    module.__dict__[KEY] = held
    module.__class__ = kind


def take_off(module: nn.Module) -> None:
    """Give the original class back."""
    module.__class__ = original_class(module)
    module.__dict__.pop(KEY, None)


def held_by(module: nn.Module) -> Any:
    """What a patched module asks, or None for a plain one."""
    return module.__dict__.get(KEY)


@functools.cache
def attention_class(original: type) -> type:
    """The subclass of a token-attention class."""
    bind = _Binder(original.forward)  # type: ignore[attr-defined]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_tracing(x)
        given = bind(x, *args, **kwargs)
        layer = self.__dict__[KEY]
        core = project(self, x, given.get("rope"), given.get("attn_mask"), bool(given.get("is_causal", False)))
        out = _in_graph(core, layer) if torch.compiler.is_compiling() else layer.attend(core)
        return original.forward(self, **given) if out is None else finish(self, x, out)  # type: ignore[attr-defined]

    return _subclass(original, {"forward": forward})


def _in_graph(core: Core, layer: Any) -> Tensor | None:
    if core.causal or core.dropout:
        return None
    plane = [] if NOW.plane is None else [*NOW.plane, layer.root.prefix]
    return attend_in_graph(core.q, core.k, core.v, core.mask, layer.ticket, core.scale, plane).transpose(1, 2)


@functools.cache
def root_class(original: type) -> type:
    """The subclass of a model class that cuts pictures into patches."""
    members: dict[str, Any] = {}
    for name in ("forward_features", "forward_intermediates"):
        if hasattr(original, name):
            members[name] = _followed(getattr(original, name), once=name == "forward_features")
    for name in ("_pos_embed", "_forward_embeds"):
        if hasattr(original, name):
            members[name] = _embedding(getattr(original, name))
    return _subclass(original, members)


def _followed(function: Callable[..., Any], once: bool) -> Callable[..., Any]:
    bind = _Binder(function)

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[KEY].root.run(function, self, bind(*args, **kwargs), once)

    return method


def _embedding(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = function(self, *args, **kwargs)
        return out if torch.compiler.is_compiling() else self.__dict__[KEY].root.embedded(out)

    return method


def _subclass(original: type, members: dict[str, Any]) -> type:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, _, state, *more = original.__reduce_ex__(self, protocol)  # type: ignore
        return object.__new__, (original,), {k: v for k, v in state.items() if k != KEY}, *more  # type: ignore

    def __prepare_scriptable__(self: Any) -> Any:
        raise AccelerateError(NO_SCRIPT)

    own = {"__reduce_ex__": __reduce_ex__, "__prepare_scriptable__": __prepare_scriptable__}
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    kind: type = type(original.__name__, (original,), {**named, **own, **members, "_foveal_original": original})
    return kind


class _Binder:
    """Positional and keyword arguments (without self) -> dict by name in the signature's order, defaults left out."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.names = list(inspect.signature(function).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return {name: given.pop(name) for name in self.names if name in given} | given
