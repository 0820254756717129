"""Linear attention over all tokens, without order: ReLU features, a gate on keys and on values, division or subtraction.

Letters: B batch, H heads, N tokens, K key width, V value width.
Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens".

With q^ = relu(q) + eps, k^ = key_gate (relu(k) + eps), v^ = value_gate v:

* division: ``w_ij = q^_i k^_j / (sum_l q^_i k^_l + eps N)``, weights of at least 0 (with such gates) that sum to 1 up to eps;
* subtraction (no eps): ``w_ij = s_ij + (1 - sum_l s_il) / N`` with ``s_ij = scale q^_i k^_j / N``: rows sum to exactly 1.

Notable choices: sums are fp32 whatever the inputs (over thousands of tokens fp16 overflows); nothing of size [N, K] is written in fp32
by the Triton implementation; the key gate enters the denominator, the value gate does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.kernels.gated_linear.checks import check_tensors
from foveal.kernels.gated_linear.needs import choose
from foveal.kernels.gated_linear.plain_repeat import kept
from foveal.kernels.gated_linear.reference import wide

NORMALISATIONS = ("division", "subtraction")


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, normalisation: str = "division", key_gate: Tensor | None = None, value_gate: Tensor | None = None,
    added: Tensor | None = None, eps: float = 1e-6, scale: float | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Every token attends to every token, in time linear in their number.

    q, k              [B, H, N, K] with any strides, fp16, bf16, fp32 (fp64 in PyTorch);  v [B, H, N, V]
    normalisation     "division" or "subtraction" (see above)
    key_gate          broadcastable to [B, H, N, 1]; 0 removes a token in division, where it also leaves N unchanged
    value_gate        broadcastable to [B, H, N, 1]
    added             [B, H, n, V], n at most N: added to the outputs of the last n tokens (LINA's convolution of the image)
    eps               of division
    scale             of subtraction, default K ** -0.5; division does not depend on a scale

    -> out [B, H, N, V] with v's dtype. Differentiable in all tensors. Raises ValueError or TypeError in one sentence.
    """
    found = kept((q, k, v, key_gate, value_gate, added), normalisation, eps, scale, implementation)
    if found is not None and found[0]:
        (steps, *_), addresses = found
        out = torch.empty_like(v)
        steps(out, *addresses)
        return out
    out, steps = _first(q, k, v, key_gate, value_gate, added, normalisation, eps, scale, implementation)
    if found is not None and steps is not None:
        found[0].append(steps)
    return out


def projected_linear_attention(
    qkv: Tensor, heads: int, *, normalisation: str = "division", key_gate: Tensor | None = None, value_gate: Tensor | None = None,
    added: Tensor | None = None, eps: float = 1e-6, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """``linear_attention`` of one projection's output, without a view of its parts.

    qkv     [B, N, 3 H d]: queries, keys and values of all heads, one after the other
    added   [B, n, H d], added to the outputs of the last n tokens;  all else as in ``linear_attention``

    -> [B, N, H d], contiguous
    """
    found = kept((qkv, key_gate, value_gate, added), heads, normalisation, eps, implementation)
    if found is not None and found[0]:
        (steps, *_), (at, *others) = found
        b, n, width = qkv.shape
        out = qkv.new_empty((b, n, width // 3))
        part = width // 3 * qkv.element_size()
        steps(out, at, at + part, at + 2 * part, *others)
        return out
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    added = None if added is None else added.unflatten(-1, (heads, -1)).transpose(1, 2)
    out, steps = _first(q, k, v, key_gate, value_gate, added, normalisation, eps, None, implementation)
    if found is not None and steps is not None and out.transpose(1, 2).is_contiguous():
        found[0].append(steps)
    return out.transpose(1, 2).flatten(2)


def _first(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, added: Tensor | None, normalisation: str, eps: float,
    scale: float | None, implementation: str | None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """-> out, and what takes the same steps for other tensors of this kind, or None"""
    check_tensors("linear_attention", q, k, v)
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"there is no normalisation {normalisation!r}; choose one of {', '.join(NORMALISATIONS)}.")
    kg, vg = _gate("key_gate", key_gate, q), _gate("value_gate", value_gate, q)
    _check_added(added, v)
    if q.numel() == 0 or v.numel() == 0:
        return with_last(torch.zeros_like(v), added), None
    name = choose(q, v, implementation).name
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if name == "triton":
        from foveal.kernels.gated_linear.plain_operator import fused

        return fused(q, k, v, kg, vg, added, normalisation == "division", factor, eps)
    rule = every_pair if name == "reference" else summed
    return with_last(rule(q, k, v, kg, vg, normalisation == "division", factor, eps), added), None


def _check_added(added: Tensor | None, v: Tensor) -> None:
    if added is None:
        return
    b, h, n, width = v.shape
    if added.ndim != 4 or (*added.shape[:2], added.shape[3]) != (b, h, width) or added.shape[2] > n:
        raise ValueError(f"added has shape {tuple(added.shape)}; ({b}, {h}, at most {n}, {width}) is needed.")
    if added.device != v.device or not added.is_floating_point():
        raise ValueError(f"added is {added.dtype} on {added.device}; a floating-point tensor on {v.device} is needed.")


def with_last(out: Tensor, added: Tensor | None) -> Tensor:
    """``added`` [B, H, n, V] on the last n tokens of out [B, H, N, V]; out itself without it."""
    if added is None:
        return out
    first = out.shape[2] - added.shape[2]
    return torch.cat([out[:, :, :first], out[:, :, first:] + added.to(out.dtype)], 2)


def _gate(name: str, gate: Tensor | None, q: Tensor) -> Tensor | None:
    if gate is None:
        return None
    shape = (*q.shape[:3], 1)
    if gate.shape != shape and (
        gate.ndim > 4 or any(a not in (1, b) for a, b in zip(reversed(gate.shape), reversed(shape), strict=False))
    ):
        raise ValueError(f"{name} has shape {tuple(gate.shape)}; it must be broadcastable to {shape}.")
    if gate.device != q.device or not gate.is_floating_point():
        raise ValueError(f"{name} is {gate.dtype} on {gate.device}; a floating-point gate on {q.device} is needed.")
    return gate.expand(shape)


def features(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, divide: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> q^, k^, v^ in the wide dtype."""
    dtype, add = wide(q.dtype), eps if divide else 0.0
    q, k, v = torch.relu(q).to(dtype) + add, torch.relu(k).to(dtype) + add, v.to(dtype)
    k = k if key_gate is None else k * key_gate.to(dtype)
    return q, k, v if value_gate is None else v * value_gate.to(dtype)


def every_pair(q, k, v, key_gate, value_gate, divide: bool, scale: float, eps: float) -> Tensor:
    """The definition: all weights written out, quadratic memory."""
    out, n = v.dtype, q.shape[2]
    q, k, v = features(q, k, v, key_gate, value_gate, divide, eps)
    s = q @ k.mT / n
    along = s.sum(-1, keepdim=True)
    w = s / (along + eps) if divide else scale * s + (1 - scale * along) / n
    return (w @ v).to(out)


def summed(q, k, v, key_gate, value_gate, divide: bool, scale: float, eps: float) -> Tensor:
    """Through the sums over tokens: one [K, V] matrix and one [K] vector a head."""
    out, n = v.dtype, q.shape[2]
    q, k, v = features(q, k, v, key_gate, value_gate, divide, eps)
    pairs, keys = k.mT @ (v / n), k.mean(2, keepdim=True).mT
    if divide:
        return ((q @ pairs) / (q @ keys + eps)).to(out)
    return (scale * (q @ pairs) + (1 - scale * (q @ keys)) * v.mean(2, keepdim=True)).to(out)
