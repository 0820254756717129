"""Laws of neighbourhood attention, against masks written from the definition."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grid_oracle import attention, joint_mask, qkv, window_mask

from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention
from foveal.plugins import functional
from foveal.plugins.block_map import box_rows
from foveal.plugins.layout import Layout
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.order import order_of
from foveal.plugins.site import MethodError, Site, Span, State
from foveal.plugins.windows import Window

IMPLEMENTATIONS = ("reference", "torch")
TORCH = KernelOptions(implementation="torch")


def neighborhood_attention(*args, **call):
    return functional.neighborhood_attention(*args, **{"options": TORCH, **call})


@pytest.mark.parametrize(
    "grid, knobs",
    [
        ((7, 10), dict(window=(7, 10))),
        ((7, 10), dict(window=-1, stride=(3, 4))),
        ((3, 4, 5), dict(window=-1)),
    ],
)
def test_whole_windows_equal_dense(grid, knobs):
    q, k, v = qkv(math.prod(grid))
    out = neighborhood_attention(q, k, v, grid, Neighborhood(**knobs))
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-12


def test_whole_causal_line_is_causal_attention():
    q, k, v = qkv(23)
    out = neighborhood_attention(q, k, v, (23,), Neighborhood(window=-1, causal=True, tile=4))
    assert (out - F.scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max() < 1e-12


def drawn(grid, seed):
    """Random legal knobs per axis."""
    rng = random.Random(seed)
    d = [rng.choice([1, 1, 2]) for _ in grid]
    w = [rng.randint(1, length // x) for length, x in zip(grid, d, strict=True)]
    s = [rng.randint(1, x) for x in w]
    c = [rng.random() < 0.25 for _ in grid]
    tile = tuple(rng.randint(1, 6) for _ in grid)
    return dict(window=tuple(w), stride=tuple(s), dilation=tuple(d), causal=tuple(c)), tile


TEXTS = {"none": (0, None, False), "last, 7 of 11": (11, 7, False), "first": (11, None, True)}
GRIDS = [(7, 10), (5, 6, 9), (8, 6, 10), (11, 9, 10), (37,)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_attention_with_the_explicit_mask(grid, seed, text, implementation):
    n_global, n_valid, first = TEXTS[text]
    knobs, tile = drawn(grid, (grid, seed).__repr__())
    q, k, v = qkv(math.prod(grid) + n_global)
    expected = attention(q, k, v, joint_mask(window_mask(grid, **knobs), n_global, n_valid, first))
    for config in (
        (Neighborhood(**knobs, tile=tile), Neighborhood(**knobs))
        if implementation == "torch"
        else (Neighborhood(**knobs, tile=tile),)
    ):
        out = neighborhood_attention(
            q, k, v, grid, config, n_global=n_global, n_valid=n_valid, global_first=first,
            options=KernelOptions(implementation=implementation),
        )  # fmt: skip
        assert (out - expected).abs().max() < 1e-10


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_plan_mask_pairs_and_lists_are_the_definition(grid, seed):
    knobs, tile = drawn(grid, repr((grid, seed, "plan")))
    expected = window_mask(grid, **knobs)
    plan = Neighborhood(**knobs, tile=tile).static_plan(Layout.joint(grid)).plan
    assert torch.equal(plan.mask()[0, 0], torch.from_numpy(expected))
    assert plan.pairs == expected.sum()
    order = order_of(grid, tile, knobs["dilation"])
    in_order = expected[order.token.numpy()][:, order.token.numpy()]
    starts = order.start.numpy()
    some = np.logical_or.reduceat(np.logical_or.reduceat(in_order, starts, 0), starts, 1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(in_order, starts, 0), starts, 1)
    window = Window(grid, *(tuple(knobs[x]) for x in ("window", "stride", "dilation", "causal")))
    visited, full = box_rows(order, window.tables)(slice(0, len(starts)))
    assert np.array_equal(visited, some) and np.array_equal(full, every)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_near_the_oracle(dtype, tolerance):
    grid, knobs = (8, 6, 10), dict(window=(3, 4, 5), stride=(1, 2, 3), causal=(True, False, False))
    q, k, v = qkv(480 + 11)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = neighborhood_attention(*leaves, grid, Neighborhood(**knobs), n_global=11)
    exact = [x.requires_grad_() for x in (q, k, v)]
    expected = attention(*exact, joint_mask(window_mask(grid, **knobs), 11))
    assert (out.double() - expected).abs().max() < tolerance
    out.double().sin().sum().backward(), expected.sin().sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() / b.grad.norm() < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "knobs",
    [dict(window=3), dict(window=(2, 3), stride=(1, 3), causal=(True, False), tile=(2, 4)), dict(window=2, dilation=2)],
    ids=str,
)
def test_gradients_are_exact(knobs, implementation):
    q, k, v = (x.requires_grad_() for x in qkv(24 + 2, heads=1, dim=4))
    options = KernelOptions(implementation=implementation)

    def call(q, k, v):
        return neighborhood_attention(q, k, v, (4, 6), Neighborhood(**knobs), n_global=2, options=options)

    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dilation", [(1, 1, 1), (2, 1, 3)])
def test_tile_never_changes_the_result(dilation):
    grid = (8, 6, 10)
    q, k, v = qkv(480 + 5)
    knobs = dict(window=(3, 4, 3), stride=(1, 2, 1), dilation=dilation)
    tiles = ("auto", (1, 1, 1), (4, 3, 8), (3, 4, 7), (8, 6, 10), (2, 2, 2))
    outs = [neighborhood_attention(q, k, v, grid, Neighborhood(**knobs, tile=t), n_global=5) for t in tiles]
    for out in outs[1:]:
        assert (out - outs[0]).abs().max() < 1e-12


def test_shifting_the_input_shifts_the_output_away_from_borders():
    q, k, v = (x.view(1, 2, 9, 11, 16) for x in qkv(99, batch=1))

    def flat(x):
        return x.reshape(1, 2, 99, 16)

    config = Neighborhood(window=(3, 5), tile=(4, 4))
    out = neighborhood_attention(flat(q), flat(k), flat(v), (9, 11), config).view(q.shape)
    moved = [flat(x.roll((1, 1), (2, 3))) for x in (q, k, v)]
    out2 = neighborhood_attention(*moved, (9, 11), config).view(q.shape)
    assert (out2[:, :, 2:8, 3:9] - out[:, :, 1:7, 2:8]).abs().max() < 1e-12


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extra_keys_are_global_tokens_are_the_explicit_mask(implementation):
    grid, n, extra = (5, 6), 30, 7
    q, k, v = qkv(n + extra, batch=2)
    options = KernelOptions(implementation=implementation)
    config = Neighborhood(window=3)
    joint = neighborhood_attention(q, k, v, grid, config, n_global=extra, options=options)
    out = neighborhood_attention(
        q[:, :, :n], k[:, :, :n], v[:, :, :n], grid, config, extra_k=k[:, :, n:], extra_v=v[:, :, n:], options=options
    )
    expected = attention(q[:, :, :n], k, v, joint_mask(window_mask(grid, 3), extra=extra))
    assert (out - expected).abs().max() < 1e-12
    assert (out - joint[:, :, :n]).abs().max() < 1e-12


def test_extra_keys_and_text_together():
    q, k, v = qkv(30 + 4)
    _, ek, ev = qkv(300, seed=1)
    out = neighborhood_attention(
        q, k, v, (5, 6), Neighborhood(window=3), n_global=4, n_valid=3, global_first=True, extra_k=ek, extra_v=ev
    )
    mask = joint_mask(window_mask((5, 6), 3), 4, 3, True, extra=300)
    assert (out - attention(q, torch.cat([k, ek], 2), torch.cat([v, ev], 2), mask)).abs().max() < 1e-12


def test_scale_zero_means_zero():
    q, k, v = qkv(30)
    out = neighborhood_attention(q, k, v, (5, 6), Neighborhood(window=3), scale=0.0)
    mask = torch.from_numpy(window_mask((5, 6), 3)).double()
    assert (out - mask @ v / 9).abs().max() < 1e-12


@pytest.mark.parametrize("grid, window", [((1,), 1), ((1, 1, 1), 1), ((9, 1), 3), ((13,), 5), ((3, 17), 3)])
def test_no_nan_on_awkward_grids(grid, window):
    q, k, v = qkv(math.prod(grid), dtype=torch.float32)
    out, lse = neighborhood_attention(q, k, v, grid, Neighborhood(window=window, tile=4), return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()


def test_the_log_sum_exp_is_that_of_the_explicit_mask():
    q, k, v = qkv(30 + 3)
    _, lse = neighborhood_attention(q, k, v, (5, 6), Neighborhood(window=3, tile=2), n_global=3, return_lse=True)
    scores = (q @ k.mT / 4).masked_fill(~joint_mask(window_mask((5, 6), 3), 3), -torch.inf)
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5


def test_module_sees_neighbourhoods_and_lead_tokens():
    torch.manual_seed(0)
    module = functional.NeighborhoodAttention(32, 4, window=3).double()
    x = torch.randn(2, 5, 6, 32, dtype=torch.float64)
    qkv_ = module.qkv(x.flatten(1, 2)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    expected = module.proj(attention(*qkv_, torch.from_numpy(window_mask((5, 6), 3))).transpose(1, 2).flatten(2))
    assert (module(x) - expected.view(x.shape)).abs().max() < 1e-12
    assert module(torch.randn(2, 31, 32, dtype=torch.float64), grid=(5, 6), n_global=1).shape == (2, 31, 32)
    with pytest.raises(MethodError, match="multiple of heads"):
        functional.NeighborhoodAttention(30, 4, window=3)


def test_a_host_that_permutes_tokens_gets_the_same_result():
    grid = (2, 5, 6)
    for knobs in (dict(window=(1, 3, 3)), dict(window=2, dilation=(1, 2, 3)), dict(density=0.5)):
        method = Neighborhood(**knobs)
        q, k, v = qkv(60 + 4, batch=2)
        spans = dict(visual=Span(4, 64), text=Span(0, 4), valid_text=torch.tensor([4, 1]))
        order = method.order(grid)

        def put(x, order=order):
            return torch.cat([x[:, :, :4], order.permute(x[:, :, 4:])], 2)

        plan = method.plan(q, k, v, Site("joint", "x", 0, 1, grid, **spans), State())
        ordered = method.plan(q, k, v, Site("joint", "x", 0, 1, grid, ordered=True, **spans), State())
        plain = block_sparse_attention(q, k, v, plan, options=TORCH)
        hoisted = block_sparse_attention(put(q), put(k), put(v), ordered, options=TORCH)
        assert (put(plain) - hoisted).abs().max() < 1e-12
