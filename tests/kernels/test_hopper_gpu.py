"""The Hopper kernel on its chip: random calls of every feature it takes, determinism, and the tiles beside each other."""

import pytest
import torch
from on_card import relative
from plan_fuzz import Recipe, errors, make_case

from foveal.kernels.block_sparse import BlockPlan, KernelOptions, block_sparse_attention, choose
from foveal.kernels.block_sparse.hopper_call import plan_arguments
from foveal.kernels.selection import block_lists
from foveal.plugins.layout import Layout
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import Site, Span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="written for compute capability 9.0",
    ),
]

CASES = 300
HOPPER = KernelOptions(implementation="hopper")
RECIPES = [
    Recipe(dtype, dim, frozenset(features))
    for dtype, dim, features in (
        (torch.bfloat16, 128, {"even", "wide"}),
        (torch.bfloat16, 128, {"even", "lse", "order"}),
        (torch.float16, 64, {"even", "wide", "grouped", "dense"}),
        (torch.bfloat16, 128, {"lse", "dense"}),
        (torch.bfloat16, 80, {"order", "dense"}),
        (torch.float16, 32, {"heads", "lse"}),
        (torch.bfloat16, 128, {"box", "lse", "order"}),
        (torch.bfloat16, 64, {"bits", "heads"}),
        (torch.bfloat16, 128, {"block_bias", "heads", "lse"}),
        (torch.float16, 128, {"key_bias", "order", "lse"}),
        (torch.bfloat16, 128, {"init", "lse"}),
        (torch.bfloat16, 72, {"box", "bits", "block_bias", "key_bias", "dense", "init", "lse", "order", "heads"}),
        (torch.bfloat16, 128, {"even", "wide", "proxies"}),
        (torch.bfloat16, 128, {"proxies", "heads", "lse"}),
        (torch.float16, 64, {"proxies", "variance", "lse"}),
        (torch.bfloat16, 128, {"even", "wide", "proxies", "variance", "dense", "grouped"}),
        (torch.bfloat16, 128, {"proxies", "variance", "block_bias", "init", "lse"}),
    )
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.id)
def test_error_is_at_most_that_of_eager_attention(recipe: Recipe):
    ran = 0
    for seed in range(-(-CASES // len(RECIPES))):
        case = make_case(recipe, seed, "cuda", longest=400)
        if case.scale <= 0:
            continue
        ran += 1
        with torch.no_grad():
            out, lse = block_sparse_attention(
                case.q, case.k, case.v, case.plan, scale=case.scale, init=case.init, return_lse=True, options=HOPPER
            )
        ours, eager = errors(case, out, lse)
        assert ours <= 1.5 * eager + torch.finfo(recipe.dtype).eps / 2, (
            f"seed {seed}: error {ours:.2e}, eager {eager:.2e}"
        )
    assert ran > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tile", [(2, 4, 4), (4, 8, 3), (1, 8, 12)], ids=["short tiles", "96 tokens", "32 places"])
def test_windows_masked_by_products_equal_those_of_the_portable_kernel(tile: tuple[int, int, int], dtype: torch.dtype):
    grid = (4, 16, 24)
    n = grid[0] * grid[1] * grid[2]
    site = Site(role="self", name="test", layer=0, layers=1, grid=grid, visual=Span(0, n), ordered=True)
    plan = Neighborhood(window=(3, 5, 7), tile=tile).static_plan(Layout.of(site), "cuda").plan
    assert plan.box is not None and plan.box.cell is not None
    q, k, v = (torch.randn(1, n, 3, 128, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    ours, theirs = (
        block_sparse_attention(q, k, v, plan, return_lse=True, options=KernelOptions(implementation=name))
        for name in ("hopper", "triton")
    )
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_fifty_runs_are_bit_identical():
    case = make_case(RECIPES[3], 1, "cuda", longest=2000)
    first = block_sparse_attention(case.q, case.k, case.v, case.plan, options=HOPPER)
    for _ in range(50):
        assert torch.equal(block_sparse_attention(case.q, case.k, case.v, case.plan, options=HOPPER), first)


def test_a_kept_kernel_equals_a_fresh_one_and_follows_alignment():
    case = make_case(RECIPES[3], 2, "cuda", longest=400)
    wide = torch.randn(2, 400, 4, 136, device="cuda", dtype=torch.bfloat16)
    n, m = case.plan.n_queries, case.plan.n_keys
    for shift in (0, 8):  # the second is aligned to 16 bytes, its strides are not multiples of 16
        q, k, v = (wide[:, :x, :2, shift : shift + 128].transpose(1, 2) for x in (n, m, m))
        first, again = (block_sparse_attention(q, k, v, case.plan, options=HOPPER) for _ in range(2))
        other = block_sparse_attention(q, k, v, case.plan, options=KernelOptions(implementation="triton"))
        assert torch.equal(first, again)
        torch.testing.assert_close(first, other, atol=2e-2, rtol=2e-2)


def test_it_is_chosen_where_its_tiles_are_filled():
    case = make_case(RECIPES[0], 1, "cuda", longest=600)
    q = torch.randn(1, 2, 4096, 128, device="cuda", dtype=torch.bfloat16)
    assert choose(q, case.plan).name in ("hopper", "triton")
    blocks = torch.arange(32, dtype=torch.int32)
    plan = BlockPlan(
        n_queries=4096, n_keys=4096, q_start=blocks * 128, q_len=torch.full_like(blocks, 128), kv_start=blocks * 128,
        kv_len=torch.full_like(blocks, 128), count=torch.full_like(blocks, 4), n_full=torch.full_like(blocks, 4),
        index=torch.arange(4, dtype=torch.int32).repeat(32, 1),
    ).to("cuda")  # fmt: skip
    assert choose(q, plan).name == "hopper"
    short = torch.arange(256, dtype=torch.int32)
    plan = BlockPlan(
        n_queries=4096, n_keys=4096, q_start=short * 16, q_len=torch.full_like(short, 16), kv_start=short * 16,
        kv_len=torch.full_like(short, 16), count=torch.full_like(short, 4), n_full=torch.full_like(short, 4),
        index=torch.arange(4, dtype=torch.int32).repeat(256, 1),
    ).to("cuda")  # fmt: skip
    chosen = choose(q, plan)
    assert chosen.name == "triton" and "fill too little" in str(chosen)


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize(
    "n, dense", [(2049, ()), (3000, ((23, 24),)), (4001, ((0, 2), (31, 32)))], ids=["one key more", "last dense", "odd"]
)
def test_a_sequence_that_ends_inside_its_last_block_equals_double_precision(n: int, dense: tuple, dim: int):
    keep = torch.rand(1, 3, -(-n // 128), -(-n // 128), generator=torch.Generator().manual_seed(n)) < 0.3
    keep[:, :, 0] = False  # an empty list
    lists = block_lists(keep.cuda())
    start = torch.arange(0, n, 128, dtype=torch.int32, device="cuda")
    length = (n - start).clamp(max=128)
    plan = BlockPlan(
        n_queries=n, n_keys=n, q_start=start, q_len=length, kv_start=start, kv_len=length, count=lists.count,
        n_full=lists.count, index=lists.index, dense_rows=dense,
    )  # fmt: skip
    assert plan_arguments(plan, 128).switches["CUT"]
    q, k, v = (torch.randn(1, n, 3, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    out, lse = block_sparse_attention(q, k, v, plan, return_lse=True, options=HOPPER)
    want, exact = block_sparse_attention(
        q.double(), k.double(), v.double(), plan, return_lse=True, options=KernelOptions(implementation="reference")
    )
    assert relative(out, want) < 4e-3
    torch.testing.assert_close(lse.double(), exact, atol=1e-3, rtol=1e-3)
