"""What is done to queries and keys between projection and attention, as values: a norm and a rotation.

Letters: H heads, N tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm: x / sqrt(mean of squares + eps) times a weight.

    weight   [D], or [H * D] where the mean goes across heads; None: no weight. In the dtype of x
    across   the mean goes over all heads of a token (Wan), not over each head (Flux, HunyuanVideo)
    twice    the normed value is rounded to x's dtype before the weight too (diffusers' RMSNorm), not only after it (PyTorch's)
    """

    weight: Tensor | None
    eps: float
    across: bool = False
    twice: bool = False


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position: channels 2 i and 2 i + 1 of every head are turned by an angle per token.

    cos, sin   fp32 [N, D], one row per token
    shared     the even channel's cosine and the odd channel's sine serve both channels (Wan); else each channel has its own
    """

    cos: Tensor
    sin: Tensor
    shared: bool = False
