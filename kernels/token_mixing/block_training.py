"""A whole block of a gated mixer with gradients: one autograd function, whose backward calls the operators' own.

Letters as in block.py. Notable choices: a block of separate functions keeps the host three times as long as the GPU needs for a step. Products
run in the dtype of autocast; weights and their gradients keep their own, which for fp32 is what the products sum in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.kernels.gated_linear import portable_call
from foveal.kernels.token_mixing import convolution, gating, mixing, norm
from foveal.kernels.token_mixing.block_parts import BlockSettings, BlockWeights, attention_parts


class TrainedBlock(torch.autograd.Function):
    """``apply(x, kind, settings, *weights)``; kind: dtype of the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: torch.dtype, s: BlockSettings, *weights: Tensor) -> Tensor:
        w, d = BlockWeights(*weights), x.shape[2]
        x = x.contiguous()
        normed = norm._run(x, w.attn_norm, s.attn_eps, kind)
        local = convolution._run(normed, w.conv, None, s.height, s.width, s.conv_silu, kind)
        cast = [torch.cat((w.qkv, w.mix, w.narrow)).to(kind), w.out.to(kind), w.up.to(kind), w.down.to(kind)]
        joint = F.linear(local, cast[0])
        logs = gating._gates(joint[..., 3 * d :], w.gates, w.gate_bias, s.temper)
        seen, _ = portable_call.forward(_job(joint, logs, s), None, False)
        logits = joint[..., 2 * d : 3 * d]
        mixed = mixing._run(
            local, seen, logits, w.mix_bias, w.local_norm, w.seen_norm, s.local_eps, s.seen_eps, s.out_silu
        )
        both, second = norm._run_with_sum(x, F.linear(mixed, cast[1]), w.mlp_norm, s.mlp_eps, kind)
        wide = F.linear(second, cast[2])
        hidden = gating._swiglu(wide)
        ctx.save_for_backward(x, normed, local, joint, logs, seen, mixed, both, second, wide, hidden, *cast, *weights)
        ctx.settings = s
        return both + F.linear(hidden, cast[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        s: BlockSettings = ctx.settings
        x, normed, local, joint, logs, seen, mixed, both, second, wide, hidden, w_joint, w_out, w_up, w_down, *rest = (
            ctx.saved_tensors
        )
        w, d = BlockWeights(*rest), x.shape[2]
        grad = grad.contiguous()
        d_y = _flat(grad).to(w_down.dtype)
        d_down = _weight_gradient(d_y, hidden, w.down)
        d_wide = gating._swiglu_gradient((d_y @ w_down).view(hidden.shape), wide)
        d_up = _weight_gradient(d_wide, second, w.up)
        d_second = (_flat(d_wide) @ w_up).view(second.shape)
        d_both, d_o, d_mlp_norm = norm._gradients(grad, d_second, both, w.mlp_norm, s.mlp_eps, x.dtype, mixed.dtype)
        d_o = d_o if d_o.numel() else d_both
        d_out = _weight_gradient(d_o, mixed, w.out)
        d_mixed = (_flat(d_o) @ w_out).view(mixed.shape)
        d_local, d_seen, d_logits, sums = mixing._gradients(
            d_mixed, local, seen, joint[..., 2 * d : 3 * d], w.mix_bias, w.local_norm, w.seen_norm, s.local_eps, s.seen_eps, s.out_silu
        )  # fmt: skip
        parts = portable_call.backward(_job(joint, logs, s, True), d_seen, None, None)[:5]
        d_q, d_k, d_v, *d_logs = [part.transpose(1, 2).flatten(2) for part in parts if part is not None]
        narrow = joint[..., 3 * d :]
        d_gates_in, d_gate_bias = gating._logit_gradients(torch.cat(d_logs, -1), narrow, w.gates, w.gate_bias, s.temper)
        d_narrow = (_flat(d_gates_in) @ w.gates.to(d_gates_in.dtype)).view(narrow.shape)
        d_joint = torch.cat((d_q, d_k, d_v, d_logits, d_narrow), -1)
        d_qkv, d_mix, d_narrow = _weight_gradient(d_joint, local, w.qkv).split((2 * d, d, narrow.shape[-1]))
        d_local = torch.addmm(_flat(d_local), _flat(d_joint), w_joint).view(local.shape)
        d_normed, d_conv, _ = convolution._gradients(d_local, normed, w.conv, None, s.height, s.width, s.conv_silu)
        d_x, _, d_attn_norm = norm._gradients(d_both, d_normed, x, w.attn_norm, s.attn_eps, x.dtype, None)
        d_heads = sums[:2].sum(1)
        return d_x, None, None, *BlockWeights(
            attn_norm=d_attn_norm, conv=d_conv, qkv=d_qkv, mix=d_mix, mix_bias=sums[2].flatten().to(w.mix_bias.dtype), narrow=d_narrow,
            gates=_weight_gradient(d_gates_in, narrow, w.gates), gate_bias=d_gate_bias.to(w.gate_bias.dtype),
            local_norm=d_heads[0].to(w.local_norm.dtype), seen_norm=d_heads[1].to(w.seen_norm.dtype), out=d_out, mlp_norm=d_mlp_norm,
            up=d_up, down=d_down,
        )  # fmt: skip


def _job(joint: Tensor, logs: Tensor, s: BlockSettings, backward: bool = False) -> portable_call.Job:
    q, k, v, *gates = attention_parts(joint, logs, s.heads)
    return portable_call.job_of(q, k, v, (gates[0], gates[1]), s.scale, backward)


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of weight [out, in] in its dtype; grad [.., out], x [.., in]."""
    grad, x = grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1])
    if weight.dtype != grad.dtype and grad.is_cuda:
        return torch.mm(grad, x, out_dtype=weight.dtype)
    return (grad @ x).to(weight.dtype)
