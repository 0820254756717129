"""Queries and keys finished in one kernel: norm, rotation, joining with the text and token order in one pass, for sparse calls.

Letters: B batch, H heads, N tokens of a stream, M tokens of the joint sequence, D head dim.

* diffusers norms, rotates and joins in ten to twenty passes over q and k; next to sparse attention that is a good part of a block.
* Only plain RMS norms without hooks are replaced; anything else keeps the model's own operations, and the summary names why.
* Only calls that the method takes. One that it hands back runs in the model's own processor from its start, and gives its bits.
* Where the order hook stands aside, queries and keys are put in the method's order on the way: plans need not carry it.
* Inference outside compiled graphs: a compiler fuses these operations itself, and our kernel has no gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.kernels.order import permute_tokens
from foveal.kernels.query_key import Norm, norm_and_rotate, refusal
from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.fused_families import FAMILIES, Call, Family, Stream
from foveal.plugins.diffusers_host.layer import Core, Layer
from foveal.plugins.order import Order
from foveal.plugins.site import Site

DEVICES = ("cuda",)  # elsewhere nothing is gained, and nothing is said
ON = "norm and rotation of queries and keys run as one kernel (fused query/key norm and rotation)"
OFF = "norm and rotation of queries and keys stay the model's own operations"


class Places(NamedTuple):
    """An order of the joint sequence, its text left in place: int64 [M] on the device, and what undoes it."""

    order: Tensor
    inverse: Tensor


class Fusion:
    """The fused way through one bound layer."""

    def __init__(self, family: Family, layer: Layer) -> None:
        self.family, self.layer = family, layer

    def run(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """What the processor returns; None where this call is left to the processor."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if not self.layer.frame.fused or self.layer.unfused or hidden.device.type not in DEVICES:
            return None
        if torch.is_grad_enabled():
            self.layer.record.note(f"{OFF}: gradients are on.")
            return None
        call = self.family.read(attn, *args, **kwargs)
        if isinstance(call, str):
            return self._leave(call)
        site = self.layer.foresees(_shape_only(call))
        if site is None:
            return None
        streams, v = self.family.project(attn, call)
        norms = [self._norms(stream) for stream in streams]
        why = next((n for n in norms if isinstance(n, str)), None) or _refusal(streams, norms)
        if why is not None:
            return self._leave(why)
        places = self._places(site, call)
        q, k = _finished(streams, norms, places)
        if places is not None:
            v = _permuted(v, places.order)
        out = self.layer.attend_sparse(Core(q, k, v, call.mask, ordered=places is not None))
        if out is None:
            return None
        self.layer.record.note(f"{ON}.")
        return self.family.output(attn, out if places is None else _permuted(out, places.inverse), call)

    def _places(self, site: Site, call: Call) -> Places | None:
        """The method's order, where the tokens are not in it already."""
        order = None if site.ordered else self.layer.method.order(site.grid)
        if order is None or order.identity:
            return None
        return joint_places(order.on(call.hidden.device), site.visual.start, call.tokens)

    def _leave(self, why: str) -> None:
        """Not to be tried again in this run: by then queries and keys have been projected in vain."""
        self.layer.record.note(f"{OFF}: {why}.")
        self.layer.unfused = True

    def _norms(self, stream: Stream) -> tuple[Norm, Norm] | str:
        h, d = stream.q.shape[2:]
        first, second = (norm_of(m, h * d if self.family.across else d, self.family.across) for m in stream.norms)
        if isinstance(first, str) or isinstance(second, str):
            return first if isinstance(first, str) else str(second)
        return first, second


def fusion_of(original: Any, layer: Layer) -> Fusion | None:
    """The fused way for one of diffusers' own processors; None for every other class, subclasses included."""
    kind = type(original)
    family = FAMILIES.get(kind.__name__) if kind.__module__.startswith("diffusers.") else None
    return None if family is None else Fusion(family, layer)


def norm_of(module: Any, width: int, across: bool) -> Norm | str:
    """What a norm module computes over ``width`` channels, or why we cannot say."""
    if module is None:
        return "there is no norm of queries and keys"
    kind, twice = type(module).__name__, type(module) is private.rms_norm()
    if not twice and type(module) is not nn.RMSNorm:
        return f"{kind} is no RMS norm that foveal knows"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return f"there are hooks on {kind}"
    dims, weight = module.dim if twice else module.normalized_shape, module.weight
    if tuple(dims) != (width,) or not isinstance(module.eps, float) or (twice and module.bias is not None):
        return f"{kind} has another width than its queries, a bias, or no eps"
    if weight is not None and type(weight) not in (nn.Parameter, Tensor):
        return f"the weight of {kind} is a {type(weight).__name__}"
    return Norm(None if weight is None else weight.detach(), module.eps, across, twice)


def _refusal(streams: list[Stream], norms: list[Any]) -> str | None:
    reasons = (refusal(s.q, s.k, n, s.rotation) for s, n in zip(streams, norms, strict=True))
    return next((why for why in reasons if why is not None), None)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def joint_places(order: Order, start: int, tokens: int) -> Places:
    """An order of the visual tokens that begin at ``start``, for a sequence of ``tokens``. Kept: all layers share it."""
    places = []
    for index in (order.token, order.inverse):
        joint = torch.arange(tokens, device=index.device)
        joint[start : start + order.tokens] = index + start
        places.append(joint)
    return Places(*places)


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """x [B, M, H, D] -> the same shape"""
    return permute_tokens(x.transpose(1, 2), order).transpose(1, 2)


def _finished(streams: list[Stream], norms: list[Any], places: Places | None) -> tuple[Tensor, Tensor]:
    """-> q, k [B, M, H, D], every stream written to its place. The visual tokens lie in one stream, so no order leaves its stream."""
    b, _, h, d = streams[0].q.shape
    total, at = sum(s.q.shape[1] for s in streams), 0
    q, k = (x.new_empty(b, total, h, d) for x in streams[0][:2])
    for stream, norm in zip(streams, norms, strict=True):
        end = at + stream.q.shape[1]
        order = None if places is None else places.order[at:end] - at
        norm_and_rotate(stream.q, stream.k, norm, stream.rotation, order=order, out=(q[:, at:end], k[:, at:end]))
        at = end
    return q, k


def _shape_only(call: Call) -> Core:
    """A core whose tensors have batch and tokens, and nothing else."""
    x = call.hidden.new_empty(1).expand(call.hidden.shape[0], call.tokens, 1, 1)
    return Core(x, x, x, call.mask)
