"""Scores between block means in Triton: the products, the scale and what is added, in one pass that writes each score once.

Letters as in scoring.py; D head dim, BM query blocks, BN key blocks and BK channels of a tile.

* Means are fp32. Their products run on tensor cores in three tf32 parts each, which keeps fp32's accuracy: relative L2 error 1.4e-7 and not one of
  2,583,552 blocks chosen otherwise than in fp64, against 2.1e-7 and one in cuBLAS's fp32 (plain tf32: 7.7e-4 and 753). 112 us against 162 us for the
  product alone (118,784 x 24 x 128 in blocks of 128, one H100).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Larger tiles take 119 to 128 us, and those of Gaussian scores do not fit the registers.
BM, BN, BK, WARPS, STAGES = 64, 64, 32, 4, 3
PRECISION = "tf32x3"


@triton.jit
def score_kernel(
    Q, K, Var, N, Out, scale, R, C, H, GROUP,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WEIGHTED: tl.constexpr, GAUSSIAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(2).to(tl.int64)
    of_keys = bh // H * (H // GROUP) + bh % H // GROUP
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    q_row, k_row = Q + (bh * R + r)[:, None] * D, (of_keys * C + c)[None, :] * D
    acc = tl.zeros([BM, BN], tl.float32)
    spread = tl.zeros([BM, BN], tl.float32)
    for first in range(0, D, BK):
        d = first + tl.arange(0, BK)
        q = tl.load(q_row + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        there = (c < C)[None, :] & (d < D)[:, None]
        k = tl.load(K + k_row + d[:, None], mask=there, other=0.0)
        acc = tl.dot(q, k, acc, input_precision=PRECISION)
        if GAUSSIAN:
            var = tl.load(Var + k_row + d[:, None], mask=there, other=0.0)
            spread = tl.dot(q * q, var, spread, input_precision=PRECISION)
    score = acc * scale
    if GAUSSIAN:
        score += spread * (0.5 * scale * scale)
    n = tl.load(N + of_keys * C + c, mask=c < C, other=0.0)
    if WEIGHTED:
        score += tl.log(tl.maximum(n, 1.0))[None, :]
    score = tl.where((n == 0)[None, :], -float("inf"), score)
    to = Out + (bh * R + r)[:, None] * C + c[None, :]
    tl.store(to, score, mask=(r < R)[:, None] & (c < C)[None, :])


def scores_of(q: Tensor, k: Tensor, var: Tensor | None, n: Tensor, scale: float, weighted: bool) -> Tensor:
    """q [B, H, R, D], k and var [B, Hkv, C, D], n [B, Hkv, C], fp32 -> fp32 [B, H, R, C] as in ``block_scores``"""
    q, k, n = q.contiguous(), k.contiguous(), n.contiguous()
    b, h, r, d = q.shape
    c = k.shape[2]
    out = torch.empty(b, h, r, c, device=q.device)
    if out.numel():
        score_kernel[(triton.cdiv(c, BN), triton.cdiv(r, BM), b * h)](
            q, k, k if var is None else var.contiguous(), n, out, scale, r, c, h, h // k.shape[1], D=d, BM=BM, BN=BN, BK=BK,
            WEIGHTED=weighted, GAUSSIAN=var is not None, PRECISION=PRECISION, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out
