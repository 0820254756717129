"""Laws of the conversion to and from PyTorch's BlockMask."""

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from foveal.kernels.block_sparse import KernelOptions, PlanError, block_sparse_attention
from foveal.plugins.layout import Layout
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.plans.block_mask import from_block_mask, to_block_mask
from foveal.plugins.site import Span


def ordered(method, grid, n_global=0):
    n = torch.Size(grid).numel()
    text = Span(n, n + n_global) if n_global else None
    return method.static_plan(Layout(grid, Span(0, n), text=text, ordered=True))


UNIFORM = {
    "full blocks": ordered(GRAT(group=(2, 4)), (8, 8)).plan,
    "ragged last block": ordered(GRAT(group=(1, 20)), (1, 50)).plan,
    "box": ordered(Neighborhood(window=(3, 5), tile=(2, 4)), (8, 8)).plan,
    "row bits": dataclasses.replace(ordered(GRAT(group=(2, 2), pattern="X", tile=(4, 4)), (8, 8)).plan, kv_order=None),
    "text": ordered(GRAT(group=(2, 4)), (8, 8), n_global=8).plan,
    "valid text": ordered(GRAT(group=(2, 4)), (8, 8), n_global=8).with_valid_text(torch.tensor([0, 3, 8])),
}


@pytest.mark.parametrize("name", UNIFORM)
def test_block_masks_attend_the_same_pairs(name):
    plan = UNIFORM[name]
    block_mask = to_block_mask(plan)
    b, h = block_mask.kv_num_blocks.shape[:2]
    assert torch.equal(create_mask(block_mask.mask_mod, b, h, plan.n_queries, plan.n_keys, device="cpu"), plan.mask())
    assert torch.equal(
        block_mask.to_dense()[:, :, : plan.n_q_blocks, : plan.n_kv_blocks].bool(), plan.visits().expand(b, h, -1, -1)
    )


@pytest.mark.parametrize("name", UNIFORM)
def test_flex_attention_with_the_block_mask_equals_the_operator(name):
    plan = UNIFORM[name]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 16, generator=g) for n in (plan.n_queries, plan.n_keys, plan.n_keys))
    expected = block_sparse_attention(q, k, v, plan, options=KernelOptions(implementation="torch"))
    assert (flex_attention(q, k, v, block_mask=to_block_mask(plan)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", UNIFORM)
def test_there_and_back_is_the_same_mask(name):
    plan = UNIFORM[name]
    again = from_block_mask(to_block_mask(plan), plan.n_queries, plan.n_keys)
    assert torch.equal(again.mask(), plan.mask())


MODS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q - k).abs() <= 7,
    "documents": lambda b, h, q, k: q // 23 == k // 23,
    "heads differ": lambda b, h, q, k: (q - k).abs() <= 10 * h + 3,
    "nothing": lambda b, h, q, k: q < 0,
}


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("size", [16, (32, 16)])
def test_any_mask_mod_becomes_a_plan(name, size):
    block_mask = create_block_mask(MODS[name], 2, 2, 100, 90, device="cpu", BLOCK_SIZE=size)
    plan = from_block_mask(block_mask, 100, 90)
    assert torch.equal(plan.mask(), create_mask(MODS[name], 2, 2, 100, 90, device="cpu"))
    assert "evaluated" in plan.label


def test_runs_of_keys_alike_stay_together():
    block_mask = create_block_mask(MODS["documents"], 1, 1, 92, 92, device="cpu", BLOCK_SIZE=16)
    assert (
        from_block_mask(block_mask, 92, 92).n_kv_blocks == 6 + 3
    )  # every block edge, and three document edges inside blocks


@pytest.mark.parametrize(
    "plan, words",
    [
        (ordered(GRAT(group=3), (8, 8)).plan, "query blocks are not uniform"),
        (GRAT(group=4).static_plan(Layout.joint((8, 8))).plan, "permutes tokens inside the operator"),
        (dataclasses.replace(UNIFORM["full blocks"], key_bias=torch.zeros(1, 1, 64)), "has key_bias"),
        (dataclasses.replace(UNIFORM["full blocks"], block_bias=torch.zeros(1, 1, 8)), "has block_bias"),
    ],
    ids=["ragged", "permuting", "key bias", "block bias"],
)
def test_what_a_block_mask_cannot_express_is_refused(plan, words):
    with pytest.raises(PlanError, match=words):
        to_block_mask(plan)


def test_a_block_mask_of_another_length_is_refused():
    block_mask = create_block_mask(MODS["causal"], 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(PlanError, match="64 queries and 80 keys"):
        from_block_mask(block_mask, 64, 80)
