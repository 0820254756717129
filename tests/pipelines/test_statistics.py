"""Laws of the intervals and tests."""

import math

import numpy as np
import pytest

from foveal.pipelines.statistics import bootstrap_ci, bootstrap_ratio, holm, mcnemar, median_iqr, seed_of, wilson


@pytest.mark.parametrize("prompts", [15, 60], ids=["percentile", "bca"])
def test_coverage_of_the_95_percent_interval(prompts):
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(500):
        found = bootstrap_ci(rng.normal(3.0, 2.0, size=prompts), seed=trial, draws=1000)
        hits += found.low <= 3.0 <= found.high
    low = 0.92 if prompts >= 50 else 0.88  # a percentile interval of 15 values is known to be short
    assert low <= hits / 500 <= 0.97


def test_seeds_of_a_prompt_are_resampled_together():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(12, 1))
    copied = np.repeat(one, 8, axis=1)
    assert bootstrap_ci(copied, seed=3).to_list() == pytest.approx(bootstrap_ci(one, seed=3).to_list())


def test_paired_differences_cancel_what_prompts_share():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, size=(30, 2))
    a, b = hard + 1, hard + rng.normal(0, 0.1, size=(30, 2))
    paired = bootstrap_ci(a - b, seed=0)
    assert paired.low > 0.9 and paired.high < 1.1


def test_same_seed_same_interval_to_the_last_bit():
    data = np.random.default_rng(2).normal(size=(25, 2))
    assert bootstrap_ci(data, seed=7) == bootstrap_ci(data, seed=7)
    assert bootstrap_ci(data, seed=7) != bootstrap_ci(data, seed=8)


def test_one_prompt_has_no_interval():
    assert bootstrap_ci([[1.0, 2.0]], seed=0) is None


def test_constant_data_give_a_point():
    found = bootstrap_ci(np.full(30, 2.5), seed=0)
    assert found.low == found.value == found.high == 2.5


def test_missing_values_are_left_out():
    assert bootstrap_ci([1.0, 2.0, float("nan"), 3.0], seed=0).value == 2.0


def test_bca_follows_the_skew():
    data = np.random.default_rng(3).lognormal(0, 1.2, size=40)
    found = bootstrap_ci(data, seed=0)
    assert found.method == "bootstrap BCa"
    assert found.high - found.value > found.value - found.low


def test_ratio_of_equal_times_is_one_and_scales():
    dense, fast = np.array([2.0, 3.0, 4.0]), np.array([1.0, 1.5, 2.0])
    found = bootstrap_ratio(dense, fast, seed=0)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_ratio_refuses_unpaired_values():
    with pytest.raises(ValueError, match="paired"):
        bootstrap_ratio([1.0, 2.0], [1.0], seed=0)


@pytest.mark.parametrize(("k", "n", "low", "high"), [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (64, 64, 0.943, 1.0)])
def test_wilson_known_values(k, n, low, high):
    found = wilson(k, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)


def test_mcnemar_is_the_exact_sign_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(3, 7) == pytest.approx(2 * sum(math.comb(10, k) for k in range(4)) / 2**10)
    assert mcnemar(5, 5) == 1.0


def test_holm_keeps_order_and_never_lowers_a_p_value():
    p = [0.01, 0.04, 0.03]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06])
    assert all(a >= b for a, b in zip(holm(p), p, strict=True))


def test_the_config_hash_does_not_depend_on_key_order():
    assert seed_of({"a": 1, "b": [2]}) == seed_of({"b": [2], "a": 1}) != seed_of({"a": 2, "b": [2]})


def test_median_and_quartiles():
    assert median_iqr([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median_s": 3.0, "iqr": [2.0, 4.0], "n": 5}
    assert median_iqr([])["n"] == 0
