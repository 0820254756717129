"""Gated linear attention in chunks, in PyTorch: any device, any precision, differentiable and compilable as it stands.

Letters: B batch, H heads, N tokens, K key width, V value width, G gate width (K, or 1), C tokens of a chunk, M chunks, S tokens of
half a block.

Notable choices:

* Every weight is ``exp`` of a sum of log gates over a run of tokens. Inside a chunk, the pair (i, j) is handled at the level where
  the two fall into different halves of one block of 2 S tokens; both factors reach to the middle of that block, so every exponent
  is a sum of gates, at most 0, and never a difference of two large ones: nothing overflows, nothing cancels, a gate of -inf forgets
  exactly. (The paper's secondary chunks need a product element by element on the diagonal; here all pairs are matrix products.)
* Per level two sums are kept for each token: ``upto`` its half of the block, from the half's start to the token, and ``after`` it, to
  the half's end. Forward sums take the token's own gate into ``upto``, backward ones into ``after``.
* The states that enter the chunks come from a recursion over pairs of chunks: a logarithmic number of steps, not one per chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.gated_linear.reference import wide

LONGEST_CHUNK = 64


def chunked(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, scale: float, state: Tensor | None,
    chunk: int = LONGEST_CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [B, H, N, K]; v [B, H, N, V]; gates [B, H, N, G] natural log, at least one of them; state [B, H, K, V] or None.

    -> (out [B, H, N, V] in v's dtype: the sum over directions, state of the first direction given). chunk: a power of two.
    """
    n, dtype = q.shape[2], wide(q.dtype)
    size = min(chunk, 1 << (n - 1).bit_length())
    split = lambda x: F.pad(x.to(dtype), (0, 0, 0, -n % size)).unflatten(2, (-1, size))  # noqa: E731
    q, k, values = split(q) * scale, split(k), split(v)
    sums = [None if g is None else own(split(g), i == 1) for i, g in enumerate((forward, backward))]
    out, sums = inside(q, k, values, sums)
    final: Tensor | None = None
    for i, pair in enumerate(sums):
        if pair is None:
            continue
        entering, last = states(k, values, pair, None if final is not None else state, i == 1)
        query = pair[1] if i == 1 else pair[0]
        out = out + (q * query.exp()) @ entering
        final = last if final is None else final
    assert final is not None
    return out.flatten(2, 3)[:, :, :n].to(v.dtype), final


Sums = tuple[Tensor, Tensor]


def own(gate: Tensor, reverse: bool) -> Sums:
    """(upto, after) of blocks of one token."""
    nothing = torch.zeros_like(gate)
    return (nothing, gate) if reverse else (gate, nothing)


def halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """[..., C, D] -> the left and the right halves of its blocks of 2 s rows, each [..., C / 2s, s, D]."""
    both = x.unflatten(-2, (-1, 2, s))
    return both[..., 0, :, :], both[..., 1, :, :]


def joined(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack((left, right), -3).flatten(-4, -2)


def doubled(sums: Sums, s: int) -> Sums:
    """(upto, after) of blocks of s tokens -> of blocks of 2 s."""
    (upto_l, upto_r), (after_l, after_r) = (halves(x, s) for x in sums)
    left, right = (u[..., :1, :] + a[..., :1, :] for u, a in ((upto_l, after_l), (upto_r, after_r)))
    return joined(upto_l, upto_r + left), joined(after_l + right, after_r)


def inside(q: Tensor, k: Tensor, v: Tensor, sums: list[Sums | None]) -> tuple[Tensor, list[Sums | None]]:
    """What tokens of one chunk give each other, and the sums over whole chunks. q scaled, all [B, H, M, C, ...]."""
    forward, backward = sums
    directions = sum(x is not None for x in sums)
    out = directions * (q * k).sum(-1, keepdim=True) * v
    s = 1
    while s < q.shape[-2]:
        (ql, qr), (kl, kr), (vl, vr), (left, right) = (halves(x, s) for x in (q, k, v, out))
        if forward is not None:
            (_, upto), (after, _) = (halves(x, s) for x in forward)
            right = right + ((qr * upto.exp()) @ (kl * after.exp()).mT) @ vl
            forward = doubled(forward, s)
        if backward is not None:
            (_, upto), (after, _) = (halves(x, s) for x in backward)
            left = left + ((ql * after.exp()) @ (kr * upto.exp()).mT) @ vr
            backward = doubled(backward, s)
        out = joined(left, right)
        s *= 2
    return out, [forward, backward]


def states(k: Tensor, v: Tensor, sums: Sums, state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """-> (the state entering each chunk [B, H, M, K, V], the state after the last)."""
    upto, after = sums
    key, whole = (upto, after[..., :1, :]) if reverse else (after, upto[..., -1:, :])
    given = (k * key.exp()).mT @ v
    keep = whole.exp().mT.expand(*given.shape[:-1], 1)
    first = torch.zeros_like(given[:, :, 0]) if state is None else state.to(given.dtype)
    if not reverse:
        return entering(keep, given, first)
    each, last = entering(keep.flip(2), given.flip(2), first)
    return each.flip(2), last


def entering(keep: Tensor, given: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """``h_{m+1} = keep_m h_m + given_m`` with h_0 = first. keep [B, H, M, K, 1], given [B, H, M, K, V] -> (h_0.. h_{M-1}, h_M)."""
    m = given.shape[2]
    if m == 1:
        return first[:, :, None], keep[:, :, 0] * first + given[:, :, 0]
    if m % 2:
        each, before = entering(keep[:, :, :-1], given[:, :, :-1], first)
        return torch.cat((each, before[:, :, None]), 2), keep[:, :, -1] * before + given[:, :, -1]
    (keep_l, keep_r), (given_l, given_r) = ((x[:, :, ::2], x[:, :, 1::2]) for x in (keep, given))
    left, last = entering(keep_l * keep_r, keep_r * given_l + given_r, first)
    right = keep_l * left + given_l
    return torch.stack((left, right), 3).flatten(2, 3), last
