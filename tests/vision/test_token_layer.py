"""The frame of layers that know their grid: who tells them, and what happens when nobody did."""

import copy

import pytest
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor

import foveal
from foveal.plugins.accelerate import AccelerateError
from foveal.vision.context_mixing import ContextMixingTokens
from foveal.vision.decay_attention import DecayAttention, SwinDecayAttention
from foveal.vision.sparsifiner import SparsifinerAttention
from foveal.vision.token_layer import bind_grid


def vit(layer=DecayAttention, **options):
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 16, "num_heads": 2, "dynamic_img_size": True, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **(sizes | options)).eval()


def picture(*size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("prefix", "options"), [
    (0, {"class_token": False, "global_pool": "avg"}), (1, {}), (5, {"reg_tokens": 4}),
], ids=str)  # fmt: skip
def test_prefix_and_grid_are_told(prefix, options):
    model = bind_grid(vit(**options))
    model(picture(48, 80))
    assert {(b.attn.where.prefix, b.attn.where.grid) for b in model.blocks} == {(prefix, (3, 5))}


def test_binding_again_changes_nothing():
    model = bind_grid(bind_grid(vit()))
    assert len(model.patch_embed._forward_pre_hooks) == 1 and len(model.blocks[0]._forward_hooks) == 1


def test_a_copy_has_a_grid_of_its_own():
    model = bind_grid(vit())
    model(picture(48, 80))
    twin = copy.deepcopy(model)
    twin(picture(32, 32))
    assert model.blocks[0].attn.where.grid == (3, 5) and twin.blocks[1].attn.where.grid == (2, 2)


@pytest.mark.parametrize("sizes", [[(48, 80)], [(48, 80), (64, 32)]], ids=["one size", "two sizes in one step"])
def test_checkpointing_changes_no_gradient(sizes):
    grads = []
    for on in (False, True):
        model = bind_grid(vit())
        model.set_grad_checkpointing(on)
        sum(model(picture(*size)).square().sum() for size in sizes).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_whole_graph_is_compiled_for_every_size():
    model = bind_grid(vit(depth=1))
    graph = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((48, 80), (64, 32)):
        torch.testing.assert_close(graph(picture(*size)), model(picture(*size)))


def test_a_square_needs_no_telling():
    layer = DecayAttention(16, 2)
    x = torch.randn(1, 9, 16)
    torch.testing.assert_close(layer(x), layer(x, grid=(3, 3)))


def test_who_was_not_told_says_so():
    with pytest.raises(ValueError, match=r"21 tokens do not form a square grid plus 0 prefix tokens; call .*bind_grid"):
        vit()(picture(64, 80))


LAYERS = {
    "decay": DecayAttention, "swin": SwinDecayAttention, "contmix": ContextMixingTokens,
    "sparsifiner": SparsifinerAttention.with_options(tokens=16), "sparsifiner blocks": SparsifinerAttention.with_options(tokens=16, block=4),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_checkpointing_and_copies(kind):
    model = bind_grid(vit(LAYERS[kind], img_size=(48, 80))).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    outs = []
    for m in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(picture(48, 80).expand(2, -1, -1, -1))
        out.float().square().sum().backward()
        outs.append([out, *(p.grad for p in m.parameters() if p.grad is not None)])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_levels_come_out_as_maps(kind):
    model = bind_grid(vit(LAYERS[kind]))
    x = picture(48, 80)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape for m in maps] == [(1, 16, 3, 5)] * 2


@pytest.mark.parametrize("kind", LAYERS)
def test_acceleration_leaves_them_alone(kind):
    with pytest.raises(AccelerateError, match="VisionTransformer is left as it is"):
        foveal.accelerate(bind_grid(vit(LAYERS[kind])), "neighborhood", window=3)


def test_a_trace_is_bit_exact_before_binding_and_refused_after():
    model = vit(class_token=False, global_pool="avg", dynamic_img_size=False, img_size=64)
    options = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    graph = create_feature_extractor(model, ["head"], tracer_kwargs=options)
    assert torch.equal(graph(picture(64, 64))["head"], model(picture(64, 64)))
    with pytest.raises(TypeError, match=r"cannot be traced symbolically.*torch\.compile"):
        create_feature_extractor(bind_grid(model), ["head"], tracer_kwargs=options)


@pytest.mark.parametrize(("model", "message"), [
    (lambda: vit("attn"), "no layer that asks for a grid"),
    (lambda: torch.nn.Sequential(DecayAttention(16, 2)), "no patch_embed that says its grid"),
], ids=["plain", "no embedding"])  # fmt: skip
def test_models_that_cannot_be_told_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        bind_grid(model())


def test_norms_need_their_class():
    with pytest.raises(ValueError, match="qk_norm and scale_norm need norm_layer"):
        DecayAttention(16, 2, qk_norm=True)
    layer = DecayAttention(16, 2, qk_norm=True, scale_norm=True, norm_layer=torch.nn.LayerNorm)
    assert layer(torch.randn(1, 9, 16)).shape == (1, 9, 16)
