"""Laws of linear attention without order, in PyTorch; the Triton kernels are held against it elsewhere."""

import pytest
import torch
from torch import Tensor

from foveal.kernels.gated_linear import linear_attention

BOTH = pytest.mark.parametrize("normalisation", ["division", "subtraction"])


def draw(n: int = 50, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n)
    return tuple(torch.randn(2, 3, n, w, dtype=dtype) for w in (8, 8, 6))  # type: ignore[return-value]


def lively() -> tuple[Tensor, Tensor, Tensor]:
    """Without queries that ReLU empties: eps is then small beside every denominator."""
    q, k, v = draw()
    return q.abs() + 0.1, k, v


def gates(n: int = 50) -> tuple[Tensor, Tensor]:
    return torch.rand(1, 3, n, 1, dtype=torch.float64) + 0.5, torch.rand(1, 3, n, 1, dtype=torch.float64) + 0.5


@BOTH
@pytest.mark.parametrize("n", [1, 7, 50])
def test_sums_equal_every_pair(normalisation, n):
    q, k, v = draw(n)
    key, value = gates(n)
    extra = {"normalisation": normalisation, "key_gate": key, "value_gate": value}
    want = linear_attention(q, k, v, implementation="reference", **extra)
    torch.testing.assert_close(linear_attention(q, k, v, **extra), want, atol=1e-12, rtol=1e-12)


@BOTH
def test_weights_sum_to_one(normalisation):
    q, k, v = lively()
    out = linear_attention(q, k, torch.ones_like(v), normalisation=normalisation)
    tolerance = 1e-4 if normalisation == "division" else 1e-12
    torch.testing.assert_close(out, torch.ones_like(v), atol=tolerance, rtol=tolerance)


@BOTH
def test_permuting_tokens_permutes_outputs(normalisation):
    q, k, v = draw()
    order = torch.randperm(50)
    torch.testing.assert_close(
        linear_attention(q[:, :, order], k[:, :, order], v[:, :, order], normalisation=normalisation),
        linear_attention(q, k, v, normalisation=normalisation)[:, :, order],
    )


@BOTH
def test_gates_of_one_are_no_gates(normalisation):
    q, k, v = draw()
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(
        linear_attention(q, k, v, normalisation=normalisation, key_gate=one, value_gate=one),
        linear_attention(q, k, v, normalisation=normalisation),
    )


def test_division_ignores_the_size_of_key_gates_and_follows_that_of_value_gates():
    q, k, v = lively()
    key, value = gates()
    plain = linear_attention(q, k, v, key_gate=key, value_gate=value)
    torch.testing.assert_close(
        linear_attention(q, k, v, key_gate=7 * key, value_gate=value), plain, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(linear_attention(q, k, v, key_gate=key, value_gate=3 * value), 3 * plain)


def test_a_key_gate_of_zero_removes_the_token():
    q, k, v = lively()
    key = torch.ones(1, 3, 50, 1, dtype=torch.float64)
    key[:, :, 20:] = 0
    got = linear_attention(q, k, v, key_gate=key, eps=1e-12)[:, :, :20]
    want = linear_attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], eps=1e-12)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-7)


@BOTH
def test_what_is_added_is_added_to_the_last_tokens(normalisation):
    q, k, v = draw()
    added = torch.randn(2, 3, 20, 6, dtype=torch.float64)
    more = linear_attention(q, k, v, normalisation=normalisation, added=added) - linear_attention(
        q, k, v, normalisation=normalisation
    )
    torch.testing.assert_close(more, torch.cat([torch.zeros_like(v[:, :, :30]), added], 2), atol=1e-14, rtol=0)


@BOTH
def test_one_token_gets_its_own_value(normalisation):
    q, k, v = (x.abs() for x in draw(1))
    torch.testing.assert_close(linear_attention(q, k, v, normalisation=normalisation), v, atol=1e-5, rtol=1e-5)


def test_a_query_without_positive_entries_averages_the_values_short_of_one():
    q, k, v = draw()
    out = linear_attention(-q.abs(), k, torch.ones_like(v))
    means = k.clamp(min=0).mean(2).sum(-1)[..., None, None]
    torch.testing.assert_close(out, (means / (means + 1)).expand_as(out), atol=1e-4, rtol=1e-4)


@BOTH
def test_fp16_stays_finite_over_many_tokens(normalisation):
    q, k, v = (6 + x for x in draw(16384, torch.float16))
    out = linear_attention(q[:1, :1], k[:1, :1], v[:1, :1], normalisation=normalisation)
    assert out.isfinite().all() and out.dtype == torch.float16


@BOTH
def test_gradients_equal_finite_differences(normalisation):
    x = [t[:1, :1].abs().add(0.1).requires_grad_() for t in (*draw(5), *gates(5))]
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, b: linear_attention(q, k, v, normalisation=normalisation, key_gate=a, value_gate=b), x
    )


def test_misfits_are_refused_in_a_sentence():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"no normalisation 'softmax'; choose one of division, subtraction"):
        linear_attention(q, k, v, normalisation="softmax")
    with pytest.raises(ValueError, match=r"key_gate has shape .* must be broadcastable to \(2, 3, 50, 1\)"):
        linear_attention(q, k, v, key_gate=torch.ones(3, 49, 1))
    with pytest.raises(ValueError, match=r"added has shape \(2, 3, 51, 6\); \(2, 3, at most 50, 6\) is needed"):
        linear_attention(q, k, v, added=v.new_zeros(2, 3, 51, 6))
