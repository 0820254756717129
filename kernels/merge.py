"""Exact merging of attention over disjoint key sets, by log-sum-exp.

Letters: B batch, H heads, N query tokens, D head dim. Pure PyTorch: differentiable, and fused well enough by the compiler.
Source: "Generalized Neighborhood Attention" (merging through log-sum-exp) and online softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the parts' outputs and log-sum-exps.

    parts: two or more (out [B, H, N, D], lse fp32 [B, H, N] natural log). A part with LSE -inf contributes nothing; where all
    parts are empty the result is 0 with LSE -inf. -> (out in the first part's dtype, lse). Raises ValueError on fewer than two
    parts or unequal shapes.
    """
    if len(parts) < 2:
        raise ValueError(f"merge_attention needs at least two (out, lse) parts; {len(parts)} given.")
    first = parts[0][0]
    for out, lse in parts:
        if out.shape != first.shape or lse.shape != first.shape[:-1]:
            raise ValueError(
                f"merge_attention got out {tuple(out.shape)} with lse {tuple(lse.shape)} beside out {tuple(first.shape)}; "
                "every part needs the same out shape and an lse of that shape without the last dimension."
            )
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    shift = torch.where(lse == -torch.inf, 0.0, lse)  # all parts empty: weights exp(-inf) = 0, never NaN
    weights = torch.exp(lses - shift)
    wide = torch.promote_types(lse.dtype, first.dtype)
    merged = sum(
        (w[..., None] * out.to(wide) for w, (out, _) in zip(weights, parts, strict=True)), torch.zeros((), dtype=wide)
    )
    return merged.to(first.dtype), lse


def scale_add(out: Tensor, scale: Tensor, add: Tensor) -> Tensor:
    """``scale * out + add`` per query: the epilogue of rectified methods. out, add [B, H, N, D]; scale [B, H, N], fp32."""
    if scale.shape != out.shape[:-1] or add.shape != out.shape:
        raise ValueError(
            f"scale_add needs scale {tuple(out.shape[:-1])} and add {tuple(out.shape)}; got {tuple(scale.shape)} and {tuple(add.shape)}."
        )
    return torch.addcmul(add.float(), scale[..., None].float(), out.float()).to(out.dtype)
