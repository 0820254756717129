"""A whole block of a gated mixer as a line of launches without a check between them.

Letters: B batch, N tokens, D width, H heads.
Source: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention".

Notable choices: what was checked for the block as a whole is not checked again, and little is cut into views that a kernel can read in
place: on the host, a block of separate operators takes longer than the GPU needs for it. Without gradients, everything after the attention
of a narrow block is one launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.kernels.gated_linear.operator import fused
from foveal.kernels.token_mixing import convolution, dispatch, gating, mixing, mlp, norm
from foveal.kernels.token_mixing.block_parts import BlockSettings, BlockWeights, attention_parts, shapes
from foveal.kernels.token_mixing.block_training import TrainedBlock
from foveal.kernels.token_mixing.launching import Operator

HALF = (torch.float16, torch.bfloat16)
OWN = (Tensor, nn.Parameter)  # other kinds of tensors may hold their numbers elsewhere


def takes_gated_block(x: Tensor, weights: BlockWeights, heads: int) -> bool:
    """Whether ``gated_block`` is made for these: weights on x's GPU that are contiguous and fit.

    With gradients, all weights must be learnt, and no graph be compiled; without, everything has one half precision.
    """
    if type(x) not in OWN or x.ndim != 3 or not x.numel() or not dispatch.fused(None, x):
        return False
    kind, device, learns = x.dtype, x.get_device(), dispatch.learns(x, *weights)
    if learns and (torch.compiler.is_compiling() or not all(w.requires_grad for w in weights)):
        return False
    cast = learns and torch.is_autocast_enabled(x.device.type)
    for w in weights:
        if type(w) not in OWN or w.get_device() != device or not w.is_contiguous():
            return False
        if w.dtype != kind and not (cast and w.dtype in dispatch.FLOATS):
            return False
    fit = [w.shape for w in weights] == shapes(x.shape[-1], heads, len(weights.narrow), weights.down.shape[-1])
    return fit and (learns or (kind in HALF and dispatch.product_dtype(x) == kind))


def gated_block(x: Tensor, weights: BlockWeights, settings: BlockSettings) -> Tensor:
    """x [B, N, D] -> the same after mixer and MLP, each with its norm and residual sum, where ``takes_gated_block`` says so."""
    if dispatch.learns(x, *weights):
        return TrainedBlock.apply(x, dispatch.product_dtype(x), settings, *weights)
    return _operator(x, list(weights), *settings)


def _run(
    x: Tensor, weights: list[Tensor], height: int, width: int, heads: int, scale: float, temper: float, attn_eps: float, local_eps: float,
    seen_eps: float, mlp_eps: float, conv_silu: bool, out_silu: bool,
) -> Tensor:  # fmt: skip
    w, d, x = BlockWeights(*weights), x.shape[2], x.contiguous()
    y, local = torch.empty_like(x), torch.empty_like(x)
    norm.norm_into(y, x, w.attn_norm, attn_eps)
    convolution.convolve_into(local, y, w.conv, height, width, conv_silu)
    joint = F.linear(local, torch.cat((w.qkv, w.mix, w.narrow)))
    logs = torch.empty_like(x, dtype=torch.float32)
    gating.gates_into(logs, joint.narrow(2, 3 * d, len(w.narrow)), w.gates, w.gate_bias, temper)
    seen, logits = fused(*attention_parts(joint, logs, heads), None, scale, False)[0], joint.narrow(2, 2 * d, d)
    if mlp.fits(x, d // heads, w.down.shape[1]):
        mlp.mix_and_mlp_into(
            y, x, local, seen.transpose(1, 2).contiguous(), logits, w.mix_bias, w.local_norm, w.seen_norm, w.out, w.mlp_norm, w.up, w.down,
            local_eps, seen_eps, mlp_eps, out_silu,
        )  # fmt: skip
        return y
    y = mixing._run(local, seen, logits, w.mix_bias, w.local_norm, w.seen_norm, local_eps, seen_eps, out_silu)
    del local, joint, logs, seen, logits
    x, y = norm._run_with_sum(x, F.linear(y, w.out), w.mlp_norm, mlp_eps, x.dtype)
    y = gating._swiglu(F.linear(y, w.up))
    x.view(-1, d).addmm_(y.view(-1, y.shape[2]), w.down.t())
    return x


def _fake(
    x: Tensor, weights: list[Tensor], height: int, width: int, heads: int, scale: float, temper: float, attn_eps: float, local_eps: float,
    seen_eps: float, mlp_eps: float, conv_silu: bool, out_silu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


_operator = Operator("gated_block", _run, _fake)
