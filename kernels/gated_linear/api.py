"""Gated linear attention: checks, the choice of an implementation, and nothing else.

Letters: B batch, H heads, N tokens, K key width, V value width.
Sources: "Gated Linear Attention Transformers with Hardware-Efficient Training"; two directions: "ViG: Linear-complexity Visual
Sequence Learning with Gated Linear Attention".
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from foveal.kernels.gated_linear.checks import check_gate, check_state, check_tensors, check_values
from foveal.kernels.gated_linear.chunked import chunked
from foveal.kernels.gated_linear.needs import choose
from foveal.kernels.gated_linear.reference import both_recurrences, wide


@overload
def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, scale: float | None = ..., initial_state: Tensor | None = ...,
    reverse: bool = ..., return_state: Literal[False] = ..., validate: bool = ..., implementation: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, scale: float | None = ..., initial_state: Tensor | None = ...,
    reverse: bool = ..., return_state: Literal[True], validate: bool = ..., implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None,
    reverse: bool = False, return_state: bool = False, validate: bool = False, implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Linear attention whose state fades: ``h <- exp(log_gate_t) h + k_t v_t``, ``out_t = scale * q_t h``.

    q, k            [B, H, N, K] with any strides ([B, N, H, K] data: pass ``x.transpose(1, 2)``); fp16, bf16, fp32 (fp64 in PyTorch)
    v               [B, H, N, V]
    log_gate        [B, H, N, K], a gate per key channel, or [B, H, N], one per head; any float dtype, natural log, at most 0;
                    0 keeps everything (plain causal linear attention), -inf forgets everything before the token
    scale           multiplies q, default K ** -0.5
    initial_state   [B, H, K, V] in fp32 (fp64 for fp64 inputs): what earlier tokens left
    reverse         tokens are read from the last to the first: the flip of the forward rule
    return_state    also return the state after the last token read
    validate        refuse gates above 0 (waits for the device); without it they make the state grow

    -> out [B, H, N, V] with v's dtype and strides, or (out, state). Differentiable in all tensors. There is no denominator:
    normalise per head afterwards. Raises ValueError or TypeError in one sentence for inputs that do not fit.
    """
    check_tensors("gated_linear_attention", q, k, v)
    gate = check_gate("log_gate", log_gate, q)
    check_state(initial_state, q, v)
    if validate:
        check_values("log_gate", gate)
    forward, backward = (None, gate) if reverse else (gate, None)
    out, state = _run(q, k, v, forward, backward, scale, initial_state, return_state, implementation)
    return (out, state) if return_state else out


def bidirectional_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, log_gate_reverse: Tensor, *, scale: float | None = None,
    validate: bool = False, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """The sum of the forward and the reverse attention over shared q, k, v, each with its own gate, in one pass over them.

    A token's own contribution counts twice. Both gates have one shape. Arguments as in ``gated_linear_attention``; a scan in
    two directions has no initial state. -> out [B, H, N, V].
    """
    check_tensors("bidirectional_gated_linear_attention", q, k, v)
    gates = check_gate("log_gate", log_gate, q), check_gate("log_gate_reverse", log_gate_reverse, q)
    if gates[0].shape != gates[1].shape:
        raise ValueError(
            f"log_gate {tuple(log_gate.shape)} and log_gate_reverse {tuple(log_gate_reverse.shape)} differ; give both directions one kind of gate."
        )
    if validate:
        check_values("log_gate", gates[0])
        check_values("log_gate_reverse", gates[1])
    return _run(q, k, v, *gates, scale, None, False, implementation)[0]


def gated_linear_step(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, H, K], v [B, H, V], log_gate [B, H, K] or [B, H], state [B, H, K, V]. -> (out [B, H, V], new state)."""
    out, state = gated_linear_attention(
        q[:, :, None], k[:, :, None], v[:, :, None], log_gate[:, :, None], scale=scale, initial_state=state,
        return_state=True, implementation="reference",
    )  # fmt: skip
    return out[:, :, 0], state


def _run(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, scale: float | None,
    state: Tensor | None, need_state: bool, implementation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    name = choose(q, v, implementation).name
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.shape[2] == 0 or q.numel() == 0 or v.numel() == 0:
        empty = v.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide(q.dtype))
        return torch.zeros_like(v), empty if state is None else state.clone()
    if name == "triton":
        from foveal.kernels.gated_linear.operator import fused

        return fused(q, k, v, forward, backward, state, factor, need_state)
    rule = both_recurrences if name == "reference" else chunked
    out, last = rule(q, k, v, forward, backward, factor, state)
    return torch.empty_like(v).copy_(out) if not out.requires_grad and out.stride() != v.stride() else out, last
