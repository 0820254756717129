"""The operator on a GPU: 2,000 random calls over at most 40 compiled variants, determinism, and long sequences."""

import pytest
import torch
import torch.nn.functional as F
from plan_fuzz import Recipe, errors, make_case, recipes

from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention
from foveal.kernels.order import permute_tokens

pytestmark = pytest.mark.gpu

CASES, VARIANTS = 2000, 40
RECIPES = [
    *recipes((torch.bfloat16, torch.float16), (128, 64)),
    *recipes((torch.float16, torch.bfloat16, torch.float32), (64, 80, 32)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.id)
def test_error_is_at_most_that_of_eager_attention(recipe: Recipe):
    options = KernelOptions(implementation="triton")
    for seed in range(-(-CASES // len(RECIPES))):
        case = make_case(recipe, seed, "cuda", longest=384)
        with torch.no_grad():
            out, lse = block_sparse_attention(
                case.q, case.k, case.v, case.plan, scale=case.scale, init=case.init, return_lse=True, options=options
            )
        ours, eager = errors(case, out, lse)
        assert ours <= 1.5 * eager + torch.finfo(recipe.dtype).eps / 2, (
            f"seed {seed}: error {ours:.2e}, eager {eager:.2e}"
        )
    assert compiled() <= VARIANTS


def compiled() -> int:
    """Variants of the portable kernel compiled in this process."""
    from foveal.kernels.block_sparse.portable import block_sparse_forward

    return sum(len(cache[0]) for cache in block_sparse_forward.device_caches.values())


def test_fifty_runs_are_bit_identical():
    case = make_case(RECIPES[12], 1, "cuda", longest=512)
    first = block_sparse_attention(case.q, case.k, case.v, case.plan, init=case.init)
    for _ in range(50):
        assert torch.equal(block_sparse_attention(case.q, case.k, case.v, case.plan, init=case.init), first)


def test_no_variant_is_compiled_for_a_second_length():

    def call(longest: int) -> int:
        case = make_case(RECIPES[1], longest, "cuda", longest=longest)
        block_sparse_attention(case.q, case.k, case.v, case.plan)
        return compiled()

    call(300), call(320)
    before = call(340)
    assert [call(n) for n in range(350, 450, 10)] == [before] * 10


def test_permuting_tokens_equals_indexing():
    x = torch.randn(2, 1000, 3, 72, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    order = torch.randperm(1000, device="cuda")
    assert torch.equal(permute_tokens(x, order), x[:, :, order])
    heads = torch.stack([torch.stack([torch.randperm(1000, device="cuda") for _ in range(3)]) for _ in range(2)])
    assert torch.equal(permute_tokens(x, heads), x.gather(2, heads[..., None].expand(-1, -1, -1, 72)))


def test_compiled_call_equals_eager_call():
    case = make_case(RECIPES[1], 5, "cuda", longest=512)
    call = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, case.plan, scale=0.1) * 2, fullgraph=True)
    torch.testing.assert_close(
        call(case.q, case.k, case.v), block_sparse_attention(case.q, case.k, case.v, case.plan, scale=0.1) * 2
    )


def test_gradients_equal_those_of_dense_attention_at_full_density():
    case = make_case(Recipe(torch.float32, 64, frozenset({"lse"})), 3, "cuda", longest=256)
    plan = case.plan.complement()
    q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
    parts = [block_sparse_attention(q, k, v, p, scale=0.1, return_lse=True) for p in (case.plan, plan)]
    from foveal.kernels.merge import merge_attention

    ours = torch.autograd.grad(merge_attention(*parts)[0].square().sum(), (q, k, v))
    dense = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, scale=0.1).square().sum(), (q, k, v))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
