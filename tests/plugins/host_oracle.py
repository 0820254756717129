"""What a method must compute in a model, without the host: the plain model, its own attention calls masked by the definition.

Letters: N tokens of a sequence.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F


def sequence_mask(grid_mask, length, start):
    """Method's mask of the grid tokens, which lie from ``start``; every other token sees and is seen by all. -> bool [N, N]"""
    mask, n = torch.ones(length, length, dtype=torch.bool), len(grid_mask)
    mask[start : start + n, start : start + n] = torch.as_tensor(grid_mask)
    return mask


@contextmanager
def masked_attention(masks):
    """Every attention of N tokens over themselves gets ``masks[N]``, on top of the model's own mask. -> the lengths it has seen"""
    original, seen = F.scaled_dot_product_attention, set()

    def attention(query, key, value, attn_mask=None, **options):
        n = query.shape[-2]
        if key.shape[-2] == n and n in masks:
            seen.add(n)
            attn_mask = masks[n] if attn_mask is None else masks[n] & attn_mask
        return original(query, key, value, attn_mask=attn_mask, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = original


class Stop(Exception):
    """Ends a forward at the call that a test wants to see."""
