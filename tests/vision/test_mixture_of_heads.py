"""Mixture of heads: against its formula, sparse against dense, conversion of pretrained models, and the loss that stays where it belongs."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import foveal
from foveal.kernels.block_sparse import KernelOptions, block_sparse_attention
from foveal.plugins.accelerate import AccelerateError
from foveal.vision.mixture_of_heads import BalanceLoss, MixtureOfHeads, mix_heads, routed_heads, routed_plan

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "patch_size": 8, "img_size": 56}
# shared, topk of 4 heads
SETTINGS = {
    "two shared": (2, 1),
    "one shared": (1, 2),
    "none shared": (0, 3),
    "all shared": (4, 0),
    "all routed": (1, 3),
}
by_setting = pytest.mark.parametrize(("shared", "topk"), SETTINGS.values(), ids=SETTINGS)


def layer(shared=1, topk=2, dim=32, heads=4, **options):
    torch.manual_seed(0)
    return MixtureOfHeads(dim, heads, qkv_bias=True, shared=shared, topk=topk, **options).double()


def tokens(n=13, dim=32, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(TINY | options)).eval()


def pictures(height=56, width=56, dtype=torch.float32):
    return torch.randn(2, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(2))


def by_the_formula(moh, x):
    """Token by token. -> out [B, N, C], balance loss or None"""
    heads, shared, topk = moh.num_heads, moh.shared, moh.topk
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in moh.qkv(x).chunk(3, -1))
    out, likely, used = torch.zeros_like(v), [], []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            weight = torch.ones(heads, dtype=x.dtype)
            if shared > 1:
                weight = torch.cat([shared * (moh.wg_1.weight @ x[b, t]).softmax(0), weight[shared:]])
            if moh.wg is not None:
                p = (moh.wg.weight @ x[b, t]).softmax(0)
                best = sorted(range(len(p)), key=lambda i: -float(p.detach()[i]))[:topk]
                m = torch.tensor([float(i in best) for i in range(len(p))], dtype=x.dtype)
                likely.append(p)
                used.append(m)
                weight = torch.cat([weight[:shared], topk * p * m / sum(p[i] for i in best)])
                if shared:
                    a, r = 2 * (moh.wg_0.weight @ x[b, t]).softmax(0)
                    weight = torch.cat([a * weight[:shared], r * weight[shared:]])
            for h in range(heads):
                scores = (k[b, :, h] @ q[b, t, h]) * v.shape[-1] ** -0.5
                out[b, t, h] = weight[h] * (scores.softmax(0) @ v[b, :, h])
    p, m = (torch.stack(t).mean(0) if t else None for t in (likely, used))
    return moh.proj(out.flatten(2)), None if p is None else len(p) ** 2 * (p * m).mean()


@by_setting
def test_equals_the_formula_with_its_loss_and_gradients(shared, topk):
    moh, outs, grads = layer(shared, topk), [], []
    for ours in (True, False):
        x = tokens().requires_grad_()
        if ours:
            with BalanceLoss(moh) as balance:
                out = moh(x)
            loss = balance.total(1.0) if moh.routed else None
            assert len(balance.losses) == bool(moh.routed)
        else:
            out, loss = by_the_formula(moh, x)
        outs.append((out, torch.zeros(()) if loss is None else loss))
        grads.append(torch.autograd.grad(out.square().sum() + (0 if loss is None else loss), [x, *moh.parameters()]))
    torch.testing.assert_close(outs[0], outs[1], **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- the sparse execution
@by_setting
@pytest.mark.parametrize("n", [13, 300], ids="{} tokens".format)
def test_sparse_equals_dense_and_so_do_the_gradients(shared, topk, n):
    """With a norm over all heads too: what is left out is the zero that it is multiplied by."""
    moh, outs, grads = layer(shared, topk, scale_norm=True, norm_layer=torch.nn.LayerNorm), [], []
    for moh.execution in ("dense", "sparse"):
        x = tokens(n).requires_grad_()
        outs.append(moh(x))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [x, *moh.parameters()]))
    torch.testing.assert_close(outs[0], outs[1], **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [13, 129, 300], ids="{} tokens".format)
def test_the_plan_attends_exactly_the_chosen_rows(n):
    chosen = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen[..., 1], chosen[0, :, 2] = False, True  # a head that no one chose, and one that all chose
    plan = routed_plan(chosen).validate()
    assert torch.equal(plan.mask(), chosen.transpose(1, 2)[..., None].expand(-1, -1, -1, n))
    assert plan.density == pytest.approx(float(chosen.double().mean()))
    routed_plan(chosen.to("meta"))  # reads no value: nothing waits for a device


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_every_kernel_gathers_the_rows(implementation):
    pytest.importorskip("triton")
    make = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, 2, 40, 16, generator=make).to(device) for _ in range(3))
    chosen = (torch.rand(1, 40, 2, generator=make) < 0.5).to(device)
    got = block_sparse_attention(q, k, v, routed_plan(chosen), options=KernelOptions(implementation=implementation))
    want = F.scaled_dot_product_attention(q, k, v) * chosen.transpose(1, 2)[..., None]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_rows_that_no_head_computes_are_not_computed():
    """Queries that are not chosen may hold anything."""
    q, k, v = (tokens(20, 8).unflatten(-1, (2, 4)).transpose(1, 2) for _ in range(3))
    chosen = (torch.arange(20) < 7)[None, :, None].expand(2, 20, 2)
    poisoned = torch.where(chosen.transpose(1, 2)[..., None], q, torch.nan)
    out = routed_heads(poisoned, k, v, chosen)
    assert (out[:, :, 7:] == 0).all()
    torch.testing.assert_close(out[:, :, :7], F.scaled_dot_product_attention(q, k, v)[:, :, :7], **CLOSE)


# ---- conversion
@pytest.mark.parametrize("shared", [None, 0, 1, 3, 4], ids="shared {}".format)
@torch.no_grad()
def test_a_converted_model_computes_what_it_did(shared):
    for options in ({}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True}):
        model, x = vit(**options).double(), pictures(dtype=torch.float64)
        plain = model(x)
        assert mix_heads(model, shared=shared) == ["blocks.0.attn", "blocks.1.attn"]
        torch.testing.assert_close(model(x), plain, **CLOSE)
        for block in model.blocks:
            block.attn.execution = "sparse"
        torch.testing.assert_close(model(x), plain, **CLOSE)


def test_converted_layers_hold_the_same_tensors_and_anneal():
    model = vit()
    weight = model.blocks[0].attn.qkv.weight
    mix_heads(model, shared=[1, 2], topk=[3, 1])
    first, second = (block.attn for block in model.blocks)
    assert first.qkv.weight is weight and (first.shared, first.topk, second.shared, second.topk) == (1, 3, 2, 1)
    before = model(pictures())
    first.set_topk(1)
    assert not torch.allclose(model(pictures()), before)
    model(pictures()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_names_of_the_routers_are_those_of_the_released_code_and_the_rest_is_timms():
    plain, mixed = vit(), vit(attn_layer=MixtureOfHeads.with_options(shared=2, topk=1))
    missing, unexpected = mixed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing == [f"blocks.{i}.attn.{w}.weight" for i in (0, 1) for w in ("wg", "wg_0", "wg_1")]
    again = vit(attn_layer=MixtureOfHeads.with_options(shared=2, topk=1))
    again.load_state_dict(mixed.state_dict())
    assert torch.equal(again(pictures()), mixed(pictures()))


@pytest.mark.parametrize(
    ("heads", "shared", "topk"), [(1, 1, 0), (2, 1, 1), (3, 1, 2), (6, 1, 4), (8, 2, 4), (12, 3, 6)]
)
def test_three_quarters_of_the_heads_are_used_by_default(heads, shared, topk):
    moh = MixtureOfHeads(4 * heads, heads)
    assert (moh.shared, moh.topk) == (shared, topk)


# ---- the loss
def test_a_balanced_router_loses_topk_and_a_lopsided_one_more():
    moh, x = layer(shared=1, topk=2), tokens(30)
    torch.nn.init.zeros_(moh.wg.weight)
    with BalanceLoss(moh) as even:
        moh(x)
    torch.testing.assert_close(even.total(1.0), torch.tensor(2.0).double(), **CLOSE)
    torch.nn.init.constant_(moh.wg.weight[0], 3.0)
    with BalanceLoss(moh) as lopsided:
        moh(x.abs())
    assert lopsided.total(1.0) > 2.5 and lopsided.total() == 0.01 * lopsided.total(1.0)


def test_losses_stay_in_their_context():
    one, other = vit(attn_layer="foveal.moh"), vit(attn_layer="foveal.moh")
    with BalanceLoss(one) as outer:
        one(pictures())
        with BalanceLoss(one) as inner:
            one(pictures())
            other(pictures())
        one(pictures())
        twin = copy.deepcopy(other)
    one(pictures())
    twin(pictures())
    assert (len(outer.losses), len(inner.losses)) == (4, 2)
    with pytest.raises(ValueError, match="no layer with routed heads ran inside"):
        BalanceLoss(other).total()


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_checkpointing_changes_neither_losses_nor_gradients(execution):
    grads = []
    for on in (False, True):
        model = vit(attn_layer=MixtureOfHeads.with_options(execution=execution)).double().train()
        model.set_grad_checkpointing(on)
        with BalanceLoss(model) as balance:
            out = model(pictures(dtype=torch.float64))
        (out.square().sum() + balance.total()).backward()
        assert len(balance.losses) == 2
        grads.append([out, balance.total(), *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a is not None and a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


# ---- refusals
def test_bad_settings_are_refused_in_a_sentence():
    for arguments, message in (
        ({"dim": 30, "num_heads": 4}, "30 is not divisible by"), ({"dim": 32, "num_heads": 4, "shared": 5}, "shared is 5; of 4 heads"),
        ({"dim": 32, "num_heads": 4, "shared": 1, "topk": 4}, "topk is 4; choose 1 to 3 of the 3 routed"),
        ({"dim": 32, "num_heads": 4, "shared": 1, "topk": 0}, "topk is 0; choose 1 to 3"), ({"dim": 32, "num_heads": 4, "shared": 4, "topk": 1}, "topk is 1; choose 0 to 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            MixtureOfHeads(**arguments)
    with pytest.raises(ValueError, match="has no option 'topp'"):
        MixtureOfHeads.with_options(topp=1)
    model = vit()
    with pytest.raises(ValueError, match="shared has 3 numbers for 2 attention layers"):
        mix_heads(model, shared=[1, 1, 1])
    assert type(model.blocks[0].attn) is Attention
    with pytest.raises(ValueError, match="Eva has no attention layer that can be converted"):
        mix_heads(timm.create_model("eva02_tiny_patch14_224", device="meta"))
    with pytest.raises(ValueError, match="DiffAttention cannot become MixtureOfHeads"):
        MixtureOfHeads.from_attention(vit(attn_layer="diff").blocks[0].attn)


def test_what_the_sparse_execution_cannot_do_is_refused_and_the_dense_one_does_it():
    moh, x, mask = layer(attn_drop=0.5).eval(), tokens(), torch.ones(13, 13).bool().tril()
    masked = moh(x, attn_mask=mask)
    torch.testing.assert_close(moh(x, is_causal=True), masked, **CLOSE)
    assert not torch.allclose(moh(x), masked) and moh.train()(x).isfinite().all()
    moh.execution = "sparse"
    with pytest.raises(ValueError, match=r"attn_drop is 0\.5 in training.*execution='dense'"):
        moh(x)
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match="MixtureOfHeads takes no"):
            moh.eval()(x, **options)
    moh.execution = "fast"
    with pytest.raises(ValueError, match="no execution 'fast'; choose from 'dense', 'sparse'"):
        moh(x)


def test_accelerate_leaves_mixed_heads_alone_and_says_so():
    reason = r"left as it is: MixtureOfHeads \(2 layers\): it is not attention of all tokens"
    with pytest.raises(AccelerateError, match=reason):
        foveal.accelerate(vit(attn_layer="foveal.moh"), "neighborhood", window=3)


# ---- what timm asks
@torch.no_grad()
def test_traced_models_are_bit_exact_and_torchscript_is_refused():
    model, x = vit(attn_layer="foveal.moh"), pictures()
    leaves = {"tracer_kwargs": {"leaf_modules": list(get_notrace_modules())}}
    graph = create_feature_extractor(model, [get_graph_node_names(model, **leaves)[0][-1]], **leaves)
    assert torch.equal(next(iter(graph.eval()(x).values())), model(x))
    with pytest.raises(RuntimeError, match=r"MixtureOfHeads cannot be turned into TorchScript.*use torch\.compile"):
        torch.jit.script(model)


@pytest.mark.parametrize("execution", ["dense", "sparse"])
@torch.no_grad()
def test_narrow_types_and_pictures_that_are_not_square(execution):
    kind = MixtureOfHeads.with_options(execution=execution)
    model, x = vit(attn_layer=kind, dynamic_img_size=True, qk_norm=True), pictures(40, 72)
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), plain, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("execution", ["dense", "sparse"])
@torch.no_grad()
def test_compiled_models_give_the_same(execution):
    model, x = vit(attn_layer=MixtureOfHeads.with_options(execution=execution), depth=1), pictures()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=execution == "dense")(x), model(x))
