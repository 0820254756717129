"""Masks and attention written from the definitions alone: what the fast paths are measured against."""

import functools

import numpy as np
import torch


def group_mask(grid, group, pattern="B", b=1, boundary="clip", offset=0):
    """Which grid keys a grid query attends, token pair by token pair. -> bool [N, N], row-major"""
    d = len(grid)
    b, offset = (b,) * d if isinstance(b, int) else b, (offset,) * d if isinstance(offset, int) else offset
    cell = np.stack(np.meshgrid(*[np.arange(g) for g in grid], indexing="ij"), -1).reshape(-1, d)
    cell = (cell + np.array(offset)) // np.array(group)
    p, m = cell[:, None], cell[None]
    if pattern == "X":
        return (p == m).any(-1)
    if pattern == "X-lines":
        return (p != m).sum(-1) <= 1
    counts = cell.max(0) + 1
    reach = np.array([n if r < 0 else r for r, n in zip(b, counts, strict=True)])
    if boundary == "clip":
        return (abs(p - m) <= reach).all(-1)
    width = np.minimum(2 * reach + 1, counts)
    start = np.clip(p - reach, 0, counts - width)
    return ((m >= start) & (m < start + width)).all(-1)


@functools.cache
def axis_mask(length, w, s=1, d=1, causal=False):
    """One axis, restated by sets: the w class positions nearest the leader's window, inside the class. -> bool [L, L]"""
    mask = np.zeros((length, length), bool)
    for q in range(length):
        members = list(range(q % d, length, d))
        i, n = members.index(q), len(range(q % d, length, d))
        group = [j for j in range(n) if j // s == i // s]
        if causal:
            lead = group[-1]
            chosen = [j for j in range(n) if lead - w < j <= i]
        else:
            lead = (i // s) * s + s // 2
            lead = lead if lead < n else n - 1
            begin = min(range(n - w + 1), key=lambda a: abs(a - (lead - w // 2)))
            chosen = range(begin, begin + w)
        mask[q, [members[j] for j in chosen]] = True
    return mask


def window_mask(grid, window, stride=1, dilation=1, causal=False):
    """Product of the axes' masks, tokens row-major. -> bool [N, N]"""

    def spread(x):
        return x if isinstance(x, tuple) else (x,) * len(grid)

    mask = np.ones((1, 1), bool)
    for axis in zip(grid, spread(window), spread(stride), spread(dilation), spread(causal), strict=True):
        length, w, s, d, c = axis
        mask = np.kron(mask, axis_mask(length, length if w == -1 else w, s, d, c))
    return mask


def joint_mask(grid_part, n_global=0, n_valid=None, first=False, extra=0):
    n = len(grid_part)
    n_valid = n_global if n_valid is None else n_valid
    mask = torch.zeros(n + n_global, n + n_global + extra, dtype=torch.bool)
    at, text = (n_global, 0) if first else (0, n)
    mask[at : at + n, at : at + n] = torch.from_numpy(grid_part)
    mask[text : text + n_global, at : at + n] = True
    mask[:, text : text + n_valid] = True
    mask[:, n + n_global :] = True
    return mask


def attention(q, k, v, mask, scale=None):
    """Plain softmax attention with an explicit mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return s.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def qkv(tokens, batch=2, heads=2, dim=16, dtype=torch.float64, seed=0, kv_heads=None):
    g = torch.Generator().manual_seed(seed)

    def make(h):
        return torch.randn(batch, h, tokens, dim, generator=g, dtype=dtype)

    return make(heads), make(kv_heads or heads), make(kv_heads or heads)
