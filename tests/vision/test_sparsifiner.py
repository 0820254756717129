"""Sparsifiner: the guess against its formulas, masks against plans, both phases, the layer in timm's ViTs, and its refusals."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from foveal.kernels.block_sparse import block_sparse_attention
from foveal.vision.sparsifiner import (
    ConnectivityPredictor,
    SparsifinerAttention,
    block_connectivity,
    connectivity,
    reconstruction_loss,
    recorded_attention,
    recorded_guesses,
    set_phase,
)
from foveal.vision.token_layer import bind_grid

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def qkv(n, heads=2, d=8, batch=2):
    make = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, n, d, generator=make, dtype=torch.float64) for _ in range(3)]


def predictor(keys, **options):
    torch.manual_seed(0)
    made = ConnectivityPredictor(8, 2, keys, **options).double()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    torch.nn.init.normal_(made.proj_back_n, std=0.03)
    return made


@pytest.mark.parametrize("reconstruct", [True, False], ids=["phase 1", "phase 2"])
def test_the_guess_follows_its_formulas(reconstruct):
    q, k, _ = qkv(30)
    made = predictor(30, rank=12)
    guess = made(q[:, :, 1:], k, reconstruct)
    for b, h, row in ((0, 0, 0), (1, 1, 17), (0, 1, 28)):
        small = made.proj_c_q.weight @ q[b, h, row + 1] + made.proj_c_q.bias
        mixtures = (k[b, h] @ made.proj_c_k.weight.T + made.proj_c_k.bias).T @ made.proj_n
        weight = (small @ mixtures / math.sqrt(2)).softmax(-1)
        want = torch.zeros(30, dtype=torch.float64)
        for i in weight.argsort(descending=True)[: 12 if reconstruct else 8]:
            basis = made.proj_back_n[:, i]
            want += weight[i] * (basis if reconstruct else torch.where(basis.abs() > 0.02, basis.abs(), 0))
        torch.testing.assert_close(guess[b, h, row], want, **CLOSE)


def test_the_rank_is_a_sixth_of_the_tokens():
    assert ConnectivityPredictor(64, 6, 197).proj_n.shape == (197, 32)
    assert ConnectivityPredictor(8, 2, 3, coefficients=8).coefficients == 1


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_each_query_keeps_its_share_and_prefix_queries_everything(prefix):
    q, k, _ = qkv(30)
    mask = connectivity(predictor(30)(q[:, :, prefix:], k), 0.25, prefix)
    assert mask[:, :, :prefix].all() and (mask[:, :, prefix:].sum(-1) == math.ceil(0.25 * 30)).all()
    assert not mask.requires_grad


@pytest.mark.parametrize(("n", "prefix", "keep"), [(64, 0, 0.25), (61, 1, 0.3), (70, 5, 0.5), (50, 10, 0.1)], ids=str)
def test_the_plan_equals_the_mask_and_so_do_the_gradients(n, prefix, keep):
    q, k, v = (x.requires_grad_() for x in qkv(n))
    blocks = -(-n // 8)
    plan = block_connectivity(q, k, predictor(blocks), block=8, keep=keep, prefix=prefix).validate()
    mask = plan.mask()
    assert mask[:, :, :prefix].all() and mask[..., :prefix].all()
    ahead, kept = -(-prefix // 8), math.ceil(keep * blocks)
    visits = plan.visits()[:, :, ahead:].sum(-1)
    assert visits.min() >= kept and visits.max() <= kept + ahead
    out = block_sparse_attention(q, k, v, plan, scale=0.3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, want, **CLOSE)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, want)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_blocks_of_one_token_are_the_tokens():
    q, k, _ = qkv(30)
    made = predictor(30)
    plan = block_connectivity(q, k, made, block=1, keep=0.25)
    assert torch.equal(plan.mask(), connectivity(made(q.float().double(), k.float().double()), 0.25))


def layer(**options):
    torch.manual_seed(0)
    return SparsifinerAttention(16, 2, **options).double().eval()


def dense(made, x):
    q, k, v = made.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
    return made.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


SATURATED = {
    "tokens": ({"tokens": 25}, False), "blocks": ({"tokens": 25, "block": 4}, False), "phase 1, any share": ({"tokens": 25, "keep": 0.1, "phase": 1}, True),
    "phase 1, blocks": ({"tokens": 25, "keep": 0.1, "phase": 1, "block": 4}, True),
}  # fmt: skip


@pytest.mark.parametrize(("options", "training"), SATURATED.values(), ids=SATURATED)
def test_keeping_everything_is_dense_attention(options, training):
    made = layer(**({"keep": 1.0} | options)).train(training)
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    torch.testing.assert_close(made(x), dense(made, x), **CLOSE)


def test_phase_one_is_for_training_only():
    made, x = layer(tokens=25, keep=0.1, phase=1), torch.randn(2, 25, 16, dtype=torch.float64)
    assert (made(x) - dense(made, x)).abs().max() > 1e-3
    torch.testing.assert_close(made(x), set_phase(made, 2)(x), rtol=0, atol=0)


def test_kept_keys_alone_matter():
    made, x = layer(tokens=25, keep=0.2), torch.randn(1, 25, 16, dtype=torch.float64)
    q, k, v = made.project(x)
    mask = connectivity(made.mask_predictor(q, k), 0.2)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    want = made.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(made(x), want, **CLOSE)


def vit(attn, **options):
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", attn_layer=attn, **sizes, **options)


@pytest.mark.parametrize("block", [None, 4], ids=["tokens", "blocks"])
def test_both_phases_train_what_they_should(block):
    student = bind_grid(vit(SparsifinerAttention.with_options(tokens=17, block=block)))
    teacher, x = vit("attn").eval(), torch.randn(2, 3, 64, 64)
    student.load_state_dict(teacher.state_dict(), strict=False)
    with torch.no_grad(), recorded_attention(teacher) as maps:
        teacher(x)
    set_phase(student, 1).train()
    with recorded_guesses(student) as guesses:
        torch.testing.assert_close(student(x), teacher(x))
    assert len(guesses) == len(maps) == 2 and torch.allclose(maps[0].sum(-1), torch.ones(2, 2, 17))
    losses = [reconstruction_loss(g, m, block) for g, m in zip(guesses, maps, strict=True)]
    (0.01 * sum(losses) / 2).backward()
    learned = {n for n, p in student.named_parameters() if p.grad is not None}
    assert {
        f"blocks.{i}.attn.mask_predictor.{p}" for i in (0, 1) for p in ("proj_n", "proj_back_n", "proj_c_q.weight")
    } <= learned
    student.zero_grad()
    set_phase(student, 2)(x).square().sum().backward()
    learned = {n for n, p in student.named_parameters() if p.grad is not None}
    assert not any("mask_predictor" in name for name in learned) and "blocks.0.attn.qkv.weight" in learned


def test_learning_brings_the_guess_closer():
    teacher = vit("attn").eval()
    student = bind_grid(vit(SparsifinerAttention.with_options(tokens=17, phase=1)))
    student.load_state_dict(teacher.state_dict(), strict=False)
    ways = [p for n, p in student.named_parameters() if "mask_predictor" in n]
    step, x, seen = torch.optim.Adam(ways, 0.02), torch.randn(4, 3, 64, 64), []
    with torch.no_grad(), recorded_attention(teacher) as maps:
        teacher(x)
    for _ in range(25):
        with recorded_guesses(student) as guesses:
            student(x)
        loss = sum(reconstruction_loss(g, m) for g, m in zip(guesses, maps, strict=True))
        step.zero_grad()
        loss.backward()
        step.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_the_block_target_is_the_share_of_a_block():
    maps = torch.rand(1, 1, 5, 5).softmax(-1)
    guess = torch.zeros(1, 1, 3, 3)
    want = sum(maps[0, 0, a : a + 2, b : b + 2].sum(-1).mean() ** 2 for a in (0, 2, 4) for b in (0, 2, 4))
    torch.testing.assert_close(reconstruction_loss(guess, maps, 2), want)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_stands_in_a_vit_with_any_prefix_and_grid(prefix):
    options = {0: {"class_token": False, "global_pool": "avg"}, 1: {}, 5: {"reg_tokens": 4}}[prefix]
    for block in (None, 4):
        kind = SparsifinerAttention.with_options(tokens=24 + prefix, block=block)
        model = bind_grid(vit(kind, dynamic_img_size=True, **options).eval())
        assert model(torch.randn(2, 3, 64, 96)).isfinite().all()


def test_state_dict_round_trip_and_bfloat16():
    one, two = layer(tokens=25, block=4), SparsifinerAttention(16, 2, tokens=25, block=4).double().eval()
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    assert torch.equal(one(x), two(x))
    whole = two.bfloat16()
    whole.keep = one.keep = 1.0  # a guess in bfloat16 may keep other blocks
    torch.testing.assert_close(whole(x.bfloat16()).double(), one(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparsifinerAttention(16, 2), r"learned for one number of tokens; give it, .*tokens=197"),
        (lambda: SparsifinerAttention(15, 2, tokens=9), "15 is not divisible by 2 heads"),
        (lambda: layer(tokens=9, keep=0.0), r"keep is 0.0; .* \(0, 1\]"),
        (lambda: layer(tokens=9, keep=1.5), "keep is 1.5"),
        (lambda: layer(tokens=9, phase=3), "phase is 3; 1 .* or 2"),
        (lambda: layer(tokens=9, block=0), "block is 0"),
        (lambda: layer(tokens=9, rank=0), "rank 0 and coefficients 8 must each be at least 1"),
        (lambda: layer(tokens=9)(torch.ones(1, 16, 16).double()), "learned for 9 keys and there are 16"),
        (lambda: layer(tokens=9)(torch.ones(1, 10, 16).double()), "10 tokens do not form a square grid"),
        (lambda: layer(tokens=9, block=4, attn_drop=0.1).train()(torch.ones(1, 9, 16).double()), "no dropout and attn_drop is 0.1; .*block=None"),
        (lambda: SparsifinerAttention.with_options(budget=3), "has no option 'budget'; it has .*keep"),
    ],
    ids=["tokens", "heads", "keep 0", "keep 1.5", "phase", "block", "rank", "other tokens", "grid", "dropout", "option"],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_masks_and_torchscript_are_refused():
    made = layer(tokens=9)
    with pytest.raises(NotImplementedError, match="SparsifinerAttention takes no attention mask"):
        made(torch.ones(1, 9, 16).double(), attn_mask=torch.ones(9, 9))
    with pytest.raises(RuntimeError, match="cannot be turned into TorchScript"):
        torch.jit.script(made)
