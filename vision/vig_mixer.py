"""ViG's token mixer: gated linear attention in two directions over tokens that a depth-wise convolution has seen.

Letters: B batch, N tokens, D width, H heads. Source: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention".

Notable choices:

* Queries, keys, values, gates and the mix all read the convolved tokens, not the input; the scan is row by row.
* The mean over directions is folded into the scale of the queries, in training and in evaluation. ``eval_half`` halves once more in
  evaluation, as the released plain models do; the norm that follows hides it unless outputs are tiny.
* Log gates and both norms are fp32, whatever the autocast dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from foveal.kernels.gated_linear import bidirectional_gated_linear_attention

XAVIER_GAIN = 2**-2.5
NOT_SCRIPTABLE = (
    "ViG cannot be turned into TorchScript, because its attention runs through operators that TorchScript cannot hold; "
    "use torch.compile or torch.export instead."
)


@register_notrace_module
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32. ``weight`` [D]."""

    def __init__(self, dim: int, eps: float = 1e-6, device: Any = None, dtype: Any = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # one kernel on a GPU, in fp32 inside
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(x.dtype)
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.to(y.dtype)).to(x.dtype)


@register_notrace_module
class BidirectionalMixer(nn.Module):
    """Tokens [B, N, D] on a grid of height * width = N -> [B, N, D].

    dim           D, divisible by 2 * num_heads; keys are D / 2 wide, values D
    conv_act      SiLU after the convolution
    out_act       SiLU before the output projection
    eval_half     halve the attention once more in evaluation (what the released plain models do)
    gate_rank     width of the bottleneck of the gates' projection
    temper        log gates are divided by it: at logit 0 a token fades to half over ``temper`` tokens
    """

    def __init__(
        self, dim: int, num_heads: int, conv_act: bool = False, out_act: bool = False, eval_half: bool = False,
        gate_rank: int = 16, temper: float = 16.0, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"the width {dim} is not divisible by twice the {num_heads} heads; change one of them.")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.temper, self.eval_half = num_heads, temper, eval_half
        self.key_width = dim // 2
        activation = lambda on: nn.SiLU() if on else nn.Identity()  # noqa: E731
        self.in_proj = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd), activation(conv_act)
        )
        self.qkv_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.gk_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False, **dd), nn.Linear(gate_rank, dim, **dd))
        self.g_proj = nn.Linear(dim, dim, **dd)
        self.o_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.g_norm = RMSNorm(dim // num_heads, **dd)
        self.l_norm = RMSNorm(dim // num_heads, **dd)
        self.out_act = activation(out_act)

    def reset_parameters(self) -> None:
        """Xavier-uniform with a small gain; gates start at a half-life of ``temper`` tokens, the mix at one half."""
        for layer in (self.in_proj[0], self.qkv_proj, self.g_proj, self.o_proj, *self.gk_proj):
            nn.init.xavier_uniform_(layer.weight, gain=XAVIER_GAIN)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(NOT_SCRIPTABLE)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, d = x.shape
        if height * width != n:
            raise ValueError(
                f"{n} tokens do not form a grid of {height} by {width}; pass the grid the tokens come from."
            )
        # Laid out once for the four projections that read it.
        local = self.in_proj(x.transpose(1, 2).reshape(b, d, height, width)).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (self._heads(t) for t in self.qkv_proj(local).split([self.key_width, self.key_width, d], -1))
        log_gates = F.logsigmoid(self._wide(self.gk_proj(local))) / self.temper
        gates = (self._heads(t) for t in log_gates.chunk(2, -1))
        mean = 0.25 if self.eval_half and not self.training else 0.5
        seen = bidirectional_gated_linear_attention(q, k, v, *gates, scale=mean * q.shape[-1] ** -0.5).transpose(1, 2)
        mix = self.g_proj(local).sigmoid().unflatten(-1, (self.num_heads, -1))
        near = self.l_norm(local.unflatten(-1, (self.num_heads, -1)))
        y = torch.lerp(near, self.g_norm(seen).to(near.dtype), mix.to(near.dtype))
        return self.o_proj(self.out_act(y.flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, H * d] -> [B, H, N, d], a view."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
