"""ViG's token mixer: gated linear attention in two directions over tokens that a depth-wise convolution has seen.

Letters: B batch, N tokens, D width, H heads. Source: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention".

Notable choices:

* Queries, keys, values, gates and the mix all read the convolved tokens, not the input; the scan is row by row.
* The mean over directions is folded into the scale of the queries, in training and in evaluation. ``eval_half`` halves once more in
  evaluation, as the released plain models do; the norm that follows hides it unless outputs are tiny.
* Log gates and both norms are fp32, whatever the autocast dtype.
* The projections of the convolved tokens are one product with their weights put together at every call; they are called one by one where
  a layer has been replaced or hooked.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from foveal.kernels.gated_linear import bidirectional_gated_linear_attention
from foveal.kernels.token_mixing import depthwise_conv, log_gates, mix_branches, rms_norm

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
        return rms_norm(x, self.weight, self.eps)


PLAIN = (nn.Linear, nn.Conv2d, nn.Sequential, nn.SiLU, nn.Identity, RMSNorm)
ONES = [(1, 1)] * 3  # stride, padding and dilation of the convolution


def unheard(m: nn.Module) -> bool:
    """Whether nothing listens to a module or stands in for its forward."""
    heard = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return not heard and "forward" not in m.__dict__


def untouched(*layers: nn.Module) -> bool:
    """Whether layers are just these and nothing listens to them, so that their weights say all that they do."""
    for m in layers:  # noqa: SIM110  (a generator takes longer)
        if type(m) not in PLAIN or not unheard(m):
            return False
    return True


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

    def layers(self) -> tuple[nn.Module, ...] | None:
        """Convolution, both of gk_proj, qkv_proj, g_proj, o_proj, l_norm, g_norm; None where their weights do not say all that this does."""
        m: dict[str, Any] = self._modules  # a look there takes a tenth of the time that an attribute takes
        in_proj, gk_proj, act = m["in_proj"], m["gk_proj"], m["out_act"]
        if type(self) is not BidirectionalMixer or not unheard(self) or not untouched(in_proj, gk_proj, act):
            return None
        first, second = tuple(in_proj._modules.values()), tuple(gk_proj._modules.values())
        rest = m["qkv_proj"], m["g_proj"], m["o_proj"], m["l_norm"], m["g_norm"]
        if (
            len(first) != 2
            or not untouched(*first, *second, *rest)
            or [first[0].stride, first[0].padding, first[0].dilation] != ONES
        ):
            return None
        return first[0], *second, *rest

    def scale(self) -> float:
        """Of the attention: that of its keys, and the mean over directions."""
        mean = 0.25 if self.eval_half and not self.training else 0.5
        return mean * (self.key_width // self.num_heads) ** -0.5

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        n = x.shape[1]
        if height * width != n:
            raise ValueError(
                f"{n} tokens do not form a grid of {height} by {width}; pass the grid the tokens come from."
            )
        local = self._local(x, height, width)
        q, k, v, logits, narrow, bias = self._project(local)
        gates = (self._heads(t) for t in self._log_gates(narrow).chunk(2, -1))
        seen = bidirectional_gated_linear_attention(*(self._heads(t) for t in (q, k, v)), *gates, scale=self.scale())
        y = mix_branches(
            local, seen, logits, self.l_norm.weight, self.g_norm.weight, bias=bias, local_eps=self.l_norm.eps, seen_eps=self.g_norm.eps,
            silu=isinstance(self.out_act, nn.SiLU),
        )  # fmt: skip
        return self.o_proj(y)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, H * d] -> [B, H, N, d], a view."""
        return x.view(x.shape[0], x.shape[1], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def _local(self, x: Tensor, height: int, width: int) -> Tensor:
        conv, act = cast(nn.Conv2d, self.in_proj[0]), self.in_proj[1]
        if untouched(conv):
            return depthwise_conv(x, (height, width), conv.weight, silu=isinstance(act, nn.SiLU))
        return self.in_proj(x.mT.unflatten(2, (height, width))).flatten(2).mT.contiguous()

    def _project(self, local: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """-> queries, keys, values, the mix without its bias, the gates' narrow projection; all of one product. And the mix's bias."""
        d, narrow = local.shape[-1], cast(nn.Linear, self.gk_proj[0])
        widths = [self.key_width, self.key_width, d]
        if not untouched(self.qkv_proj, self.g_proj, narrow):
            return *self.qkv_proj(local).split(widths, -1), self.g_proj(local), narrow(local), None
        joint = F.linear(local, torch.cat([self.qkv_proj.weight, self.g_proj.weight, narrow.weight]))
        return *joint.split([*widths, d, narrow.out_features], -1), self.g_proj.bias

    def _log_gates(self, narrow: Tensor) -> Tensor:
        layer = cast(nn.Linear, self.gk_proj[1])
        if untouched(layer):
            return log_gates(narrow, layer.weight, layer.bias, self.temper)
        return F.logsigmoid(layer(narrow).to(torch.promote_types(narrow.dtype, torch.float32))) / self.temper
