"""A block of the plain ViG. Letters: B batch, N tokens, D width. Source: as in vig.py.

Notable choices: where every layer is just what it says, a block is one call that reads all weights where they lie (kernels/token_mixing/block.py).
Nothing is kept between calls, so that edits, hooks and replaced layers count at once.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, register_notrace_module
from torch import Tensor, nn

from foveal.kernels.token_mixing import add_rms_norm, rms_norm, swiglu
from foveal.kernels.token_mixing.block import gated_block, takes_gated_block
from foveal.kernels.token_mixing.block_parts import BlockSettings, BlockWeights
from foveal.kernels.token_mixing.dispatch import product_dtype
from foveal.vision.vig_mixer import BidirectionalMixer, RMSNorm, unheard, untouched


class GatedMlp(nn.Module):
    """SwiGLU: [a, b] = gate_proj(x), down_proj(silu(a) b)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        hidden = 256 * -(-(8 * dim // 3) // 256)
        self.gate_proj = nn.Linear(dim, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x)))


@register_notrace_module
class Block(nn.Module):
    """x + mixer(norm(x)), then + mlp(norm(.)). Norms and sums are made in one pass."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, dd: dict, **mixer: Any):
        super().__init__()
        self.attn_norm = RMSNorm(dim, **dd)
        self.attn = BidirectionalMixer(dim, num_heads, **mixer, **dd)
        self.mlp_norm = RMSNorm(dim, **dd)
        self.mlp = GatedMlp(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        weights = self._weights()
        if weights is not None and height * width == x.shape[1] and takes_gated_block(x, weights, self.attn.num_heads):
            return gated_block(x, weights, self._settings(height, width))
        first, second = self.attn_norm, self.mlp_norm
        if not untouched(first, second):
            x = x + self.drop_path(self.attn(first(x), height, width))
            return x + self.drop_path(self.mlp(second(x)))
        dtype = product_dtype(x)
        y = self.attn(rms_norm(x, first.weight, first.eps, dtype=dtype), height, width)
        x, y = add_rms_norm(x, self.drop_path(y), second.weight, second.eps, dtype=dtype)
        return x + self.drop_path(self.mlp(y))

    def _weights(self) -> BlockWeights | None:
        """All, unless paths are dropped or a layer does more than its weights say."""
        m: dict[str, Any] = self._modules
        mixer, mlp, drop = m["attn"], m["mlp"], m["drop_path"]
        if not isinstance(mixer, BidirectionalMixer) or type(mlp) is not GatedMlp:
            return None
        layers = mixer.layers()
        if layers is None or not (unheard(mlp) and unheard(drop)) or (self.training and type(drop) is not nn.Identity):
            return None
        others: list[Any] = [m["attn_norm"], m["mlp_norm"], mlp._modules["gate_proj"], mlp._modules["down_proj"]]
        if not untouched(*others):
            return None
        own: list[Any] = [layer._parameters for layer in (*layers, *others)]
        conv, narrow, gates, qkv, mix, out, local, seen, first, second, up, down = own
        if not conv["bias"] is narrow["bias"] is qkv["bias"] is out["bias"] is up["bias"] is down["bias"] is None:
            return None
        return BlockWeights(
            first["weight"], conv["weight"], qkv["weight"], mix["weight"], mix["bias"], narrow["weight"], gates["weight"], gates["bias"],
            local["weight"], seen["weight"], out["weight"], second["weight"], up["weight"], down["weight"],
        )  # fmt: skip

    def _settings(self, height: int, width: int) -> BlockSettings:
        m: dict[str, Any] = self._modules
        mixer = m["attn"]
        inner: dict[str, Any] = mixer._modules
        eps = m["attn_norm"].eps, inner["l_norm"].eps, inner["g_norm"].eps, m["mlp_norm"].eps
        silu = [type(act) is nn.SiLU for act in (inner["in_proj"][1], inner["out_act"])]
        return BlockSettings(height, width, mixer.num_heads, mixer.scale(), mixer.temper, *eps, *silu)
