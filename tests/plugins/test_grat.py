"""Laws of grouped attention, against masks written from the definition."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grid_oracle import attention, group_mask, joint_mask, qkv

from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention
from foveal.plugins import functional
from foveal.plugins.layout import Layout
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.site import Site, Span, State
from foveal.plugins.windows import Window

IMPLEMENTATIONS = ("reference", "torch")
TORCH = KernelOptions(implementation="torch")
TEXTS = {"no text": (0, None, False), "text last, 7 of 11 valid": (11, 7, False), "text first": (11, None, True)}


def grat_attention(*args, **call):
    return functional.grat_attention(*args, **{"options": TORCH, **call})


CONFIGS = [
    ((7, 10), dict(group=(2, 3))),
    ((7, 10), dict(group=(2, 3), pattern="X")),
    ((7, 10), dict(group=(3, 4), tile=(2, 7))),
    ((7, 10), dict(group=(3, 4), tile=(2, 7), pattern="X")),
    ((5, 6, 9), dict(group=(2, 2, 4), b=(1, 0, -1), boundary="shift")),
    ((5, 6, 9), dict(group=(2, 3, 4), pattern="X-lines")),
    ((5, 6, 9), dict(group=2, pattern="X-lines", tile=(3, 3, 5))),
    ((8, 6, 10), dict(group=(2, 3, 5), b=1, boundary="shift")),
    ((8, 6, 10), dict(group=(3, 2, 3), pattern="X")),
    ((8, 6, 10), dict(group=(4, 2, 5), b=0, tile=(2, 2, 5))),
    ((11, 9, 10), dict(group=(3, 5, 4), b=(2, 1, 1))),
    ((11, 9, 10), dict(group=(3, 5, 4), pattern="X", tile=(6, 5, 8))),
]


def rule(grid, knobs):
    names = ("pattern", "b", "boundary")
    group = knobs["group"]
    group = (group,) * len(grid) if isinstance(group, int) else group
    return group_mask(grid, group, **{k: v for k, v in knobs.items() if k in names})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("grid, knobs", CONFIGS, ids=lambda x: str(x).replace(" ", ""))
def test_equals_attention_with_the_explicit_mask(grid, knobs, text, implementation):
    n_global, n_valid, first = TEXTS[text]
    q, k, v = qkv(math.prod(grid) + n_global, batch=1)
    mask = joint_mask(rule(grid, knobs), n_global, n_valid, first)
    out = grat_attention(
        q, k, v, grid, GRAT(**knobs), n_global=n_global, n_valid=n_valid, global_first=first,
        options=KernelOptions(implementation=implementation),
    )  # fmt: skip
    assert (out - attention(q, k, v, mask)).abs().max() < 1e-10


@pytest.mark.parametrize("grid, knobs", CONFIGS, ids=lambda x: str(x).replace(" ", ""))
def test_plan_mask_and_pairs_are_the_definition(grid, knobs):
    expected = joint_mask(rule(grid, knobs), 11, None, True)
    plan = GRAT(**knobs).static_plan(Layout.joint(grid, 11, True)).plan
    assert torch.equal(plan.mask()[0, 0], expected)
    assert plan.pairs == int(expected.sum())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_near_the_oracle(dtype, tolerance):
    q, k, v = qkv(540, batch=1)
    expected = attention(q, k, v, joint_mask(group_mask((9, 6, 10), (3, 2, 5))))
    out = grat_attention(q.to(dtype), k.to(dtype), v.to(dtype), (9, 6, 10), GRAT(group=(3, 2, 5)))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(
    "knobs", [dict(group=(2, 3), b=10), dict(group=(2, 3), b=-1), dict(group=(8, 12)), dict(group=3, pattern="dense")]
)
@pytest.mark.filterwarnings("ignore:group")
def test_everything_in_reach_equals_dense(knobs):
    q, k, v = qkv(70)
    out = grat_attention(q, k, v, (7, 10), GRAT(**knobs))
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-12


def test_single_token_groups_are_classic_criss_cross():
    q, k, v = qkv(42)
    y, x = torch.arange(42) // 7, torch.arange(42) % 7
    mask = (y[:, None] == y) | (x[:, None] == x)
    assert (grat_attention(q, k, v, (6, 7), GRAT(group=1, pattern="X")) - attention(q, k, v, mask)).abs().max() < 1e-12


def test_criss_cross_is_dense_with_one_group_on_an_axis():
    q, k, v = qkv(42)
    out = grat_attention(q, k, v, (6, 7), GRAT(group=(6, 2), pattern="X"))
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("pattern", ["B", "X", "X-lines"])
def test_tile_never_changes_the_result(pattern):
    grid = (8, 6, 10)
    q, k, v = qkv(480 + 5, batch=1)
    outs = [
        grat_attention(q, k, v, grid, GRAT(group=(2, 3, 4), pattern=pattern, tile=tile), n_global=5)
        for tile in (None, (2, 3, 4), (4, 3, 8), (1, 1, 1), (3, 4, 7), (8, 6, 10))
    ]
    for out in outs[1:]:
        assert (out - outs[0]).abs().max() < 1e-12


def test_global_queries_are_dense_and_padded_text_is_never_seen():
    grid, n, text = (5, 6), 30, 8
    q, k, v = qkv(n + text)
    out = grat_attention(q, k, v, grid, GRAT(group=2), n_global=text, n_valid=5)
    seen = torch.arange(n + text) < n + 5
    assert (out[:, :, n:] - attention(q[:, :, n:], k, v, seen)).abs().max() < 1e-12
    k2, v2 = k.clone(), v.clone()
    k2[:, :, n + 5 :], v2[:, :, n + 5 :] = 1e3, -1e3
    assert torch.equal(out, grat_attention(q, k2, v2, grid, GRAT(group=2), n_global=text, n_valid=5))


def test_text_first_and_text_last_agree_after_reordering():
    n, text = 30, 8
    q, k, v = qkv(n + text)

    def roll(x):
        return torch.cat([x[:, :, n:], x[:, :, :n]], 2)

    last = grat_attention(q, k, v, (5, 6), GRAT(group=2, pattern="X"), n_global=text, n_valid=3)
    first = grat_attention(
        roll(q), roll(k), roll(v), (5, 6), GRAT(group=2, pattern="X"), n_global=text, n_valid=3, global_first=True
    )
    assert (roll(last) - first).abs().max() < 1e-12


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_sample_has_its_own_text_length(implementation):
    q, k, v = qkv(30 + 6, batch=3)
    valid = torch.tensor([0, 6, 2])
    out = grat_attention(
        q, k, v, (5, 6), GRAT(group=2), n_global=6, n_valid=valid, options=KernelOptions(implementation=implementation)
    )
    for i, n in enumerate(valid.tolist()):
        mask = joint_mask(group_mask((5, 6), (2, 2)), 6, n)
        assert (out[i] - attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("grid, group", [((12, 20), (4, 4)), ((12, 20, 15), (3, 5, 3))])
def test_shifted_surroundings_are_neighbourhood_attention(grid, group):
    from foveal.plugins.groups import Groups

    ones = (1,) * len(grid)
    grat = Groups(grid, group, "B", ones, "shift", (0,) * len(grid)).tables
    near = Window(grid, tuple(3 * g for g in group), group, ones, (False,) * len(grid)).tables
    for a, b in zip(grat, near, strict=True):
        assert np.array_equal(a.low, b.low) and np.array_equal(a.high, b.high)


def test_a_constant_added_to_v_is_added_to_the_output_and_equal_keys_average():
    grid = (5, 6)
    q, k, v = qkv(30)
    config = GRAT(group=2, pattern="X")
    assert (grat_attention(q, k, v + 3, grid, config) - grat_attention(q, k, v, grid, config) - 3).abs().max() < 1e-12
    mask = torch.from_numpy(group_mask(grid, (2, 2), "X")).double()
    mean = mask @ v / mask.sum(-1, keepdim=True)
    assert (grat_attention(q, k[:, :, :1].expand_as(k), v, grid, config) - mean).abs().max() < 1e-12


@pytest.mark.parametrize("grid, group", [((1, 1), 1), ((1,), 1), ((13, 1), 4), ((1, 1, 9), 2), ((3, 3), 2)])
def test_no_nan_on_awkward_grids(grid, group):
    n = math.prod(grid)
    q, k, v = qkv(n)
    out, lse = grat_attention(q, k, v, grid, GRAT(group=group), return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all() and lse.shape == (2, 2, n)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("knobs", [dict(group=(2, 2)), dict(group=(2, 3), pattern="X", tile=(3, 2))], ids=str)
def test_gradients_are_exact_and_padding_gets_none(knobs, implementation):
    q, k, v = (x.requires_grad_() for x in qkv(24 + 3, batch=1, heads=1, dim=4))
    options = KernelOptions(implementation=implementation)

    def call(q, k, v):
        return grat_attention(q, k, v, (4, 6), GRAT(**knobs), n_global=3, n_valid=2, options=options)

    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)
    call(q, k, v).square().sum().backward()
    assert (k.grad[:, :, -1] == 0).all() and (v.grad[:, :, -1] == 0).all()
    assert (k.grad[:, :, :-1] != 0).any(-1).all()


def test_two_runs_are_bit_identical():
    q, k, v = qkv(540, dtype=torch.float32)

    def run():
        return grat_attention(q, k, v, (9, 6, 10), GRAT(group=(3, 2, 5)))

    assert torch.equal(run(), run())


def test_grouped_heads_and_odd_strides():
    q, k, v = qkv(30, heads=4, kv_heads=2)
    expected = attention(q, k, v, torch.from_numpy(group_mask((5, 6), (2, 2))))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = grat_attention(*strided, (5, 6), GRAT(group=2))
    assert (out - expected).abs().max() < 1e-12
    assert out.stride() == strided[0].stride()


def test_an_image_with_a_three_dimensional_group_is_squeezed():
    q, k, v = qkv(70)
    for pattern in ("B", "X", "X-lines"):
        flat = grat_attention(q, k, v, (7, 10), GRAT(group=(2, 3), pattern=pattern))
        for group in ((4, 2, 3), (2, 3)):
            assert torch.equal(flat, grat_attention(q, k, v, (1, 7, 10), GRAT(group=group, pattern=pattern)))


def test_a_host_that_permutes_tokens_gets_the_same_result():
    grid, method = (2, 5, 6), GRAT(group=(1, 2, 4))
    for pattern, tile in itertools.product(("B", "X"), (None, (2, 3, 3))):
        method = GRAT(group=(1, 2, 4), pattern=pattern, tile=tile)
        q, k, v = qkv(60 + 4)
        site = Site(
            "joint", "x", 0, 1, grid, Span(4, 64), text=Span(0, 4), valid_text=torch.tensor([4, 1], dtype=torch.int32)
        )
        ordered = Site("joint", "x", 0, 1, grid, Span(4, 64), text=Span(0, 4), valid_text=site.valid_text, ordered=True)
        order = method.order(grid)

        def put(x, order=order):
            return torch.cat([x[:, :, :4], order.permute(x[:, :, 4:])], 2)

        plain = block_sparse_attention(q, k, v, method.plan(q, k, v, site, State()), options=TORCH)
        hoisted = block_sparse_attention(put(q), put(k), put(v), method.plan(q, k, v, ordered, State()), options=TORCH)
        assert (put(plain) - hoisted).abs().max() < 1e-12
