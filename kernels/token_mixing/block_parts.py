"""What a block of a gated mixer consists of, for block.py and block_training.py. Letters as in block.py."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockWeights(NamedTuple):
    """R is the width of the gates' bottleneck, I the hidden width of the MLP."""

    attn_norm: Tensor  # [D]
    conv: Tensor  # [D, 1, 3, 3]
    qkv: Tensor  # [2 D, D]: queries and keys D / 2 wide, values D
    mix: Tensor  # [D, D]
    mix_bias: Tensor  # [D]
    narrow: Tensor  # [R, D]
    gates: Tensor  # [D, R]: forward, then reverse
    gate_bias: Tensor  # [D]
    local_norm: Tensor  # [D / H]
    seen_norm: Tensor  # [D / H]
    out: Tensor  # [D, D]
    mlp_norm: Tensor  # [D]
    up: Tensor  # [2 I, D]
    down: Tensor  # [D, I]


def shapes(d: int, heads: int, rank: int, hidden: int) -> list[tuple[int, ...]]:
    """Of BlockWeights."""
    v = d // heads
    return [
        (d,), (d, 1, 3, 3), (2 * d, d), (d, d), (d,), (rank, d), (d, rank), (d,), (v,), (v,), (d, d), (d,), (2 * hidden, d), (d, hidden),
    ]  # fmt: skip


class BlockSettings(NamedTuple):
    """height, width of the grid; scale of the attention; temper: log gates are divided by it; eps of the norms; SiLU after the convolution
    and before the output projection."""

    height: int
    width: int
    heads: int
    scale: float
    temper: float
    attn_eps: float
    local_eps: float
    seen_eps: float
    mlp_eps: float
    conv_silu: bool
    out_silu: bool


def attention_parts(joint: Tensor, logs: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Views: queries, keys, values and both gates [B, H, N, width] in rows of joint [B, N, 3 D or more] and of logs [B, N, D]."""
    b, n, d = logs.shape
    row, keys = joint.shape[2], d // 2 // heads
    own, gate = (n * row, keys, row, 1), (n * d, keys, d, 1)
    return (
        joint.as_strided((b, heads, n, keys), own, 0), joint.as_strided((b, heads, n, keys), own, d // 2),
        joint.as_strided((b, heads, n, 2 * keys), (n * row, 2 * keys, row, 1), d),
        logs.as_strided((b, heads, n, keys), gate, 0), logs.as_strided((b, heads, n, keys), gate, d // 2),
    )  # fmt: skip
