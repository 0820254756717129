"""Intervals and tests for paired comparisons over prompts and seeds.

P prompts, R seeds per prompt, K bootstrap draws.

Notable choices
- The unit that is resampled is the prompt: all seeds of a drawn prompt come along, because seeds of one prompt are not
  independent evidence.
- Percentile intervals; BCa (bias-corrected and accelerated, Efron 1987) from 20 prompts on, where its acceleration can be
  estimated. K = 2000 draws.
- The generator is seeded from the caller's seed (a run takes it from the hash of its config): the same data give the same
  interval, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

DRAWS = 2000
BCA_FROM = 20
NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float
    method: str

    def to_list(self) -> list[float]:
        return [self.low, self.high]


def seed_of(config: Any) -> int:
    """A 63-bit seed from anything JSON can hold; the same config gives the same seed on any machine."""
    text = json.dumps(config, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def by_prompt(values: Any) -> np.ndarray:
    """[P] or [P, R] -> the mean over seeds of each prompt, [P] float64; NaNs are left out, prompts without a number dropped."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"statistics take values shaped [prompts] or [prompts, seeds]; got shape {table.shape}")
    kept = table[~np.isnan(table).all(axis=1)]
    return np.nanmean(kept, axis=1) if len(kept) else np.empty(0)


def resample(prompts: int, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Indices of prompts drawn with replacement, [K, P]."""
    return np.random.default_rng(seed).integers(0, prompts, size=(draws, prompts))


def bootstrap_ci(values: Any, *, seed: int, level: float = 0.95, draws: int = DRAWS) -> Interval | None:
    """Interval of the mean over prompts of [P] or [P, R] values; None below two prompts.

    For a paired comparison give the differences method - baseline of the same prompt and seed.
    """
    means = by_prompt(values)
    if len(means) < 2:
        return None
    replicates = means[resample(len(means), seed, draws)].mean(axis=1)
    leave_one_out = (means.sum() - means) / (len(means) - 1)
    return interval(float(means.mean()), replicates, leave_one_out, level)


def bootstrap_ratio(
    numerator: Any, denominator: Any, *, seed: int, level: float = 0.95, draws: int = DRAWS
) -> Interval | None:
    """Interval of mean(numerator) / mean(denominator), the two paired by prompt: a speed-up, for example."""
    top, bottom = by_prompt(numerator), by_prompt(denominator)
    if len(top) != len(bottom):
        raise ValueError(f"a ratio needs paired values; got {len(top)} and {len(bottom)} prompts")
    if len(top) < 2:
        return None
    index = resample(len(top), seed, draws)
    replicates = top[index].mean(axis=1) / bottom[index].mean(axis=1)
    leave_one_out = (top.sum() - top) / (bottom.sum() - bottom)
    return interval(float(top.mean() / bottom.mean()), replicates, leave_one_out, level)


def interval(value: float, replicates: np.ndarray, leave_one_out: np.ndarray, level: float) -> Interval:
    """Percentile interval of the replicates, or BCa when there are prompts enough and the data vary."""
    tail = (1 - level) / 2
    low, high, method = tail, 1 - tail, "bootstrap percentile"
    spread = leave_one_out.mean() - leave_one_out
    below = float((replicates < value).mean() + 0.5 * (replicates == value).mean())
    if len(leave_one_out) >= BCA_FROM and np.any(spread != 0) and 0 < below < 1:
        bias = NORMAL.inv_cdf(below)
        acceleration = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))
        low, high = (adjusted(q, bias, acceleration) for q in (tail, 1 - tail))
        method = "bootstrap BCa"
    bounds = np.quantile(replicates, [low, high])
    return Interval(value, float(bounds[0]), float(bounds[1]), method)


def adjusted(quantile: float, bias: float, acceleration: float) -> float:
    """The BCa position of a quantile among the replicates."""
    z = bias + NORMAL.inv_cdf(quantile)
    return NORMAL.cdf(bias + z / (1 - acceleration * z))


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    z = NORMAL.inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), "wilson")


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value from the two discordant counts (right in one method only)."""
    n = only_first + only_second
    if min(only_first, only_second) < 0:
        raise ValueError(f"discordant counts cannot be negative; got {only_first} and {only_second}")
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted_p, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted_p[i] = largest
    return adjusted_p


def median_iqr(seconds: list[float]) -> dict[str, Any]:
    """{"median_s", "iqr": [q1, q3], "n"} of timings, or nulls for none."""
    if not seconds:
        return {"median_s": None, "iqr": None, "n": 0}
    q1, median, q3 = np.quantile(np.asarray(seconds, dtype=np.float64), [0.25, 0.5, 0.75])
    return {"median_s": float(median), "iqr": [float(q1), float(q3)], "n": len(seconds)}
