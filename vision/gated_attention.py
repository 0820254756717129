"""Gated attention: a sigmoid gate on the output of softmax attention, from the attention's own input. For timm's vision transformers.

Letters: B batch, N tokens, C width, H heads, d head dim.

``y = (attention(x) * sigmoid(W_g x)) W_o``. Elementwise: a gate per channel. Headwise: one per head, shared by its channels.

* All is timm's ``Attention``, whose forward already knows an elementwise gate; what is added is the headwise kind, an ``attn_layer=`` that
  plain ViTs can reach, and gates for pretrained models. Parameters: timm's, and ``gate.weight`` (``gate.bias`` where qkv has one).
* ``foveal.accelerate`` takes these layers over like any other: the gate multiplies what its kernels give.
* The gate is a product of its own, in no kernel's epilogue: it costs one pass over the output, and for the projection C x C (elementwise)
  or C x H (headwise) weights more.

Source: "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free" (Qiu et al., 2025).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import ATTN_LAYERS
from torch import Tensor, nn

from foveal.vision.token_layer import check_heads

KINDS = ("elementwise", "headwise")


class HeadGate(nn.Linear):
    """[B, N, C] -> [B, N, H d]: a logit per head, repeated over the head's channels. weight [H, C]."""

    def __init__(self, dim: int, heads: int, head_dim: int, bias: bool = True, device: Any = None, dtype: Any = None):
        super().__init__(dim, heads, bias=bias, device=device, dtype=dtype)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        logit = F.linear(x, self.weight, self.bias)
        return logit.unsqueeze(-1).expand(-1, -1, -1, self.head_dim).flatten(2)


def make_gate(kind: str, dim: int, heads: int, head_dim: int, bias: bool = True, **factory: Any) -> nn.Linear:
    """The projection W_g. Raises ``ValueError`` for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there is no gate {kind!r}; choose from {', '.join(map(repr, KINDS))}.")
    if kind == "headwise":
        return HeadGate(dim, heads, head_dim, bias, **factory)
    return nn.Linear(dim, heads * head_dim, bias=bias, **factory)


class GatedAttention(Attention):
    """timm's ``Attention`` with a gate per channel: [B, N, C] -> [B, N, C].

    ``timm.create_model("vit_small_patch16_224", attn_layer="foveal.gated")`` or ``"foveal.gated_headwise"``. A fresh gate is about one half,
    which halves the branch: for training from the start. ``gate_layers`` gates pretrained weights. Arguments are those of timm's
    ``Attention``. Raises ``ValueError`` for a width that the heads do not divide.
    """

    kind = "elementwise"

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, device: Any = None, dtype: Any = None, **timms: Any,
    ):  # fmt: skip
        check_heads(dim, num_heads)
        super().__init__(dim, num_heads=num_heads, qkv_bias=qkv_bias, device=device, dtype=dtype, **timms)
        self.gate = make_gate(self.kind, dim, num_heads, self.head_dim, qkv_bias, device=device, dtype=dtype)


class HeadwiseGatedAttention(GatedAttention):
    """``GatedAttention`` with one gate per head."""

    kind = "headwise"


ATTN_LAYERS["foveal.gated"] = GatedAttention
ATTN_LAYERS["foveal.gated_headwise"] = HeadwiseGatedAttention


def gate_layers(model: nn.Module, kind: str = "elementwise", logit: float = 4.0) -> list[str]:
    """Give every attention layer of a (pretrained) timm ViT a gate, in place. -> names of the layers

    kind     "elementwise" or "headwise"
    logit    where the gates start, whatever the input: sigmoid(4) = 0.98, so the model starts almost as it was; inf: exactly

    Takes timm's layers that know gates: ``Attention``, ``AttentionRope``, ``EvaAttention`` (ViT, DeiT, DINOv2, SigLIP, DINOv3, EVA-02,
    ROPE-ViT, PE-Core). Raises ``ValueError`` where there is none, or where one has a gate already; the model is then as it was.
    """
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "gate") and hasattr(m, "proj") and _heads(m)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that knows gates; supported are Attention, AttentionRope and EvaAttention."
        )
    gated = [name for name, m in layers.items() if m.gate is not None]
    if gated:
        raise ValueError(f"{gated[0]} has a gate already; give a model without gates.")
    gates = {name: _open_gate(layer, kind, logit) for name, layer in layers.items()}
    for name, gate in gates.items():
        layers[name].gate = gate
    return list(layers)


def _heads(layer: Any) -> bool:
    return isinstance(getattr(layer, "num_heads", None), int) and isinstance(getattr(layer, "head_dim", None), int)


def _open_gate(layer: Any, kind: str, logit: float) -> nn.Linear:
    weight = layer.proj.weight
    source = layer.qkv if layer.qkv is not None else layer.q_proj
    factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    gate = make_gate(kind, source.in_features, layer.num_heads, layer.head_dim, **factory)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, logit)
    return gate
