"""Keeping the best blocks of every row in Triton, without sorting: the weakest value that is kept is found by bisection. One program per row.

Letters as in scoring.py; K list width, STEP columns of a row in one program.

* A row stays in registers; a step of the bisection counts the values that reach a trial value. fp32 values are compared as integers of the same
  order, so that at most 32 steps, about 15 for scores of attention, find the exact value.
* Among equal values the earlier block wins, NaN ranks first and is never kept: what a stable sort by falling value does.
* top-p adds masses in the order of addresses, a sort adds them by falling value: where the mass up to a block meets p to the last bit of a sum, the
  two may part. Everything else is equal to the rules in keeping.py, bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 22,272 rows of 928 on one H100: 139 us with one warp a row, 144 with two, 161 with four; 1,485 by sorting.
COLUMNS_OF_A_WARP = 1024

NOTHING = tl.constexpr(-(2**31))  # below every value: columns that are not there
MINUS_INFINITY = tl.constexpr(-2139095041)
NOT_A_NUMBER = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(x):
    """fp32 -> int32 of the same order; -0 equals 0, every NaN is the largest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 2147483647))


@triton.jit
def middle(low, high):
    """The mean of two integers, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def weakest_of(key, low, high, total, k):
    """The k-th largest key, or another value that exactly k keys reach. total: how many keys reach ``low``."""
    while (low < high) & (total != k):
        trial = middle(low, high)
        n = tl.sum((key >= trial).to(tl.int32), 0)
        enough = n >= k
        low = tl.where(enough, trial, low)
        total = tl.where(enough, n, total)
        high = tl.where(enough, high, trial - 1)
    return low


@triton.jit
def how_many(x, key, low, high, limit, UNDER: tl.constexpr, STEP: tl.constexpr):
    """How many of the best masses x reach ``limit`` (UNDER: stay within it)."""
    while low < high:
        trial = middle(low, high)
        enough = tl.sum(tl.where(key >= trial, x, 0.0), 0) >= limit
        low = tl.where(enough, trial, low)
        high = tl.where(enough, high, trial - 1)
    above = tl.sum(tl.where(key > low, x, 0.0), 0)
    one = tl.max(tl.where(key == low, x, 0.0), 0)
    equals = tl.sum((key == low).to(tl.int32), 0)
    j = tl.arange(0, STEP)
    inside = above + (j + 1).to(tl.float32) * one <= limit if UNDER else above + j.to(tl.float32) * one < limit
    return tl.sum((key > low).to(tl.int32), 0) + tl.sum(((j < equals) & inside).to(tl.int32), 0)


@triton.jit(do_not_specialize=("k", "p", "least", "H", "R", "k_b", "k_h", "k_r"))
def best_kernel(
    X, Budget, Keep, Count, Index, k, p, least, H, R, C, K, k_b, k_h, k_r,
    STEP: tl.constexpr, SLOTS: tl.constexpr, BUDGETS: tl.constexpr, TOP_P: tl.constexpr, UNDER: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, STEP)
    x = tl.load(X + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    if BUDGETS:
        at = Budget + row // (H * R) * k_b + row // R % H * k_h + row % R * k_r
    key = tl.where(c < C, ordered(x), NOTHING)
    low = tl.min(tl.where(c < C, key, NOT_A_NUMBER), 0)
    high = tl.max(key, 0)
    if TOP_P:
        limit = tl.load(at).to(tl.float32) if BUDGETS else p
        k = tl.where(limit >= 1.0, C, tl.maximum(how_many(x, key, low, high, limit, UNDER, STEP), least))
        never = 0  # the key of mass 0
    else:
        if BUDGETS:
            k = tl.load(at).to(tl.int32)
        never = MINUS_INFINITY
    k = tl.minimum(tl.maximum(k, 1), C)
    weakest = weakest_of(key, low, high, C, k)
    above = key > weakest
    spare = k - tl.sum(above.to(tl.int32), 0)
    spare = tl.where((weakest <= never) | (weakest == NOT_A_NUMBER), 0, spare)
    above = above & (key > never) & (key != NOT_A_NUMBER)
    equal = key == weakest
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)  # two counts in one scan
    before = tl.cumsum(both, 0) - both
    equals = before >> 16
    keep = above | (equal & (equals < spare))
    if LISTS:
        place = (before & 65535) + tl.minimum(equals, spare)
        tl.store(Index + row * K + place, c, mask=keep & (place < K))
        count = tl.minimum(tl.sum(keep.to(tl.int32), 0), K)
        tl.store(Count + row, count)
        slot = tl.arange(0, SLOTS)
        tl.store(Index + row * K + slot, tl.zeros([SLOTS], tl.int32), mask=(slot >= count) & (slot < K))
    else:
        tl.store(Keep + row * C + c, keep.to(tl.int8), mask=c < C)


def keep_best(x: Tensor, budget: float | Tensor, *, mass: bool = False, under: bool = False, least: int = 1) -> Tensor:
    """x [B, H, R, C], scores and a number of blocks or, with ``mass``, masses and a share of mass. -> bool, shape of x"""
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    nowhere = torch.empty(0, dtype=torch.int32, device=x.device)
    _run(x, budget, keep.view(torch.uint8), nowhere, nowhere, 0, mass, under, least)
    return keep


def list_best(
    x: Tensor, budget: float | Tensor, width: int, *, mass: bool = False, under: bool = False, least: int = 1
) -> tuple[Tensor, Tensor]:
    """The same as lists: count int32 [B, H, R] and index int32 [B, H, R, width] in address order; unused slots hold 0."""
    count = torch.empty(x.shape[:-1], dtype=torch.int32, device=x.device)
    index = torch.empty(*x.shape[:-1], width, dtype=torch.int32, device=x.device)
    _run(x, budget, index, count, index, width, mass, under, least)
    return count, index


def _run(
    x: Tensor, budget: float | Tensor, keep: Tensor, count: Tensor, index: Tensor, width: int, mass: bool, under: bool, least: int
) -> None:  # fmt: skip
    x = x.detach().contiguous()
    h, r, c = x.shape[1:]
    own = budget.expand(x.shape[:-1]) if isinstance(budget, Tensor) else None
    number = 1 if isinstance(budget, Tensor) else budget
    rows = x.shape[:-1].numel()
    if rows:
        step = triton.next_power_of_2(c)
        best_kernel[(rows,)](
            x, x if own is None else own, keep, count, index, 1 if mass else int(number), float(number), max(1, least), h, r, c, width,
            *((0, 0, 0) if own is None else own.stride()), STEP=step, SLOTS=triton.next_power_of_2(max(1, width)), BUDGETS=own is not None,
            TOP_P=mass, UNDER=under, LISTS=width > 0, num_warps=max(1, step // COLUMNS_OF_A_WARP),
        )  # fmt: skip
