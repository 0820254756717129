"""BiFormer: its routing attention against the definition, its sizes, and what timm asks of a model in its registry."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import get_notrace_modules
from timm.models import group_parameters
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from foveal.vision.biformer import BiFormer  # registers the models
from foveal.vision.bilevel import BilevelRoutingAttention, bilevel_attention, choose_regions, region_plan, regions_of

PUBLISHED = {"biformer_tiny": 13_142_760, "biformer_small": 25_536_232, "biformer_base": 56_804_968}
SMALL = {"embed_dim": 32, "depths": (1, 1, 2, 1), "topks": (1, 2, 9, None), "n_win": 3}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def qkv(height, width, dim=32, batch=2, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, height, width, dim, generator=make, dtype=torch.float64) for _ in range(3)]


def definition(q, k, v, heads, n_win, topk, scale):
    """Token by token: the regions of every axis, their means, the best keys' regions, masked softmax. -> [B, H, W, C]"""
    batch, height, width = q.shape[:3]
    tall, wide = -(-height // n_win), -(-width // n_win)
    region = (torch.arange(height)[:, None] // tall * 1000 + torch.arange(width) // wide).flatten()
    names = region.unique()
    flat = [t.flatten(1, 2) for t in (q, k, v)]
    mean = [torch.stack([t[:, region == r].mean(1) for r in names], 1).detach() for t in flat[:2]]
    best = (mean[0] @ mean[1].mT).topk(min(topk, len(names)), -1).indices
    seen = torch.zeros(batch, len(names), len(names), dtype=torch.bool).scatter_(2, best, True)
    place = (region[:, None] == names).int().argmax(1)
    mask = seen[:, place][:, :, place]
    parts = [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in flat]
    scores = (parts[0] @ parts[1].mT * scale).masked_fill(~mask[:, None], -torch.inf)
    return (scores.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2).view_as(v)


SETTINGS = {
    "regions of 16": (12, 12, 3, 4), "regions of 4": (6, 6, 3, 2), "ragged": (13, 17, 3, 4), "fewer regions than asked": (9, 8, 7, 5),
    "small and ragged": (7, 5, 3, 2), "one region": (5, 7, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_equals_the_definition_and_so_do_the_gradients(setting):
    height, width, n_win, topk = setting
    grads, outs = [], []
    for function in (bilevel_attention, definition):
        inputs = [t.requires_grad_() for t in qkv(height, width)]
        out = function(*inputs, 2, n_win, topk, 32**-0.5)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        grads.append(torch.autograd.grad((out * weight).sum(), inputs))
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1], **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (6, 6), (11, 13)], ids=["blocks", "gathered", "ragged"])
def test_all_regions_are_dense_attention(height, width):
    q, k, v = qkv(height, width)
    parts = [t.flatten(1, 2).unflatten(2, (2, -1)).transpose(1, 2) for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*parts, scale=0.2).transpose(1, 2).flatten(2).view_as(v)
    torch.testing.assert_close(bilevel_attention(q, k, v, 2, 3, 9, 0.2), want, **CLOSE)


def test_moving_whole_regions_moves_the_outputs():
    q, k, v = qkv(12, 12)
    swap = torch.arange(12).view(3, 4)[[2, 0, 1]].flatten()
    moved = bilevel_attention(*(t[:, swap] for t in (q, k, v)), 2, 3, 2, 0.2)
    torch.testing.assert_close(moved, bilevel_attention(q, k, v, 2, 3, 2, 0.2)[:, swap], **CLOSE)


def test_one_dominant_region_is_attention_to_that_region():
    q, k, v = qkv(12, 12)
    q = q.abs()
    k[:, 4:8, 8:] += 10  # region 5 of 3 x 3
    assert (choose_regions(q, k, regions_of(12, 12, 3), 1) == 5).all()
    out = bilevel_attention(q, k, v, 2, 3, 1, 0.2)
    keys = [t[:, 4:8, 8:].flatten(1, 2).unflatten(2, (2, -1)).transpose(1, 2) for t in (k, v)]
    query = q.flatten(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
    want = F.scaled_dot_product_attention(query, *keys, scale=0.2).transpose(1, 2).flatten(2).view_as(v)
    torch.testing.assert_close(out, want, **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (13, 17)], ids=["even", "ragged"])
def test_the_plan_is_valid_and_counts_its_pairs(height, width):
    q, k, _ = qkv(height, width)
    order = regions_of(height, width, 3)
    plan = region_plan(choose_regions(q, k, order, 4), order).validate()
    assert plan.density == pytest.approx(float(plan.mask().double().mean()))
    assert plan.density == pytest.approx(4 / 9, abs=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_exactly_as_many_as_published(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_names_are_those_of_the_released_weights():
    names = set(BiFormer(**SMALL).state_dict())
    for name in (
        "downsample_layers.0.3.weight", "downsample_layers.3.1.bias", "stages.0.0.pos_embed.bias", "stages.1.0.attn.qkv.qkv.bias",
        "stages.1.0.attn.wo.bias", "stages.2.1.attn.lepe.weight", "stages.2.1.mlp.3.weight", "stages.3.0.attn.qkv.weight",
        "stages.3.0.attn.proj.bias", "norm.running_mean", "head.weight",
    ):  # fmt: skip
        assert name in names
    assert "stages.3.0.attn.qkv.bias" not in names


def test_bad_settings_are_refused_in_a_sentence():
    for arguments, message in (
        ({"dim": 30, "heads": 4}, "30 is not divisible by 4 heads"), ({"dim": 32, "heads": 1, "topk": 50}, "topk is 50; choose 1 to 49"),
        ({"dim": 32, "heads": 1, "n_win": 0}, "n_win is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            BilevelRoutingAttention(**arguments)
    with pytest.raises(ValueError, match="4 depths and 3 topks"):
        BiFormer(topks=(1, 2, 3))
    with pytest.raises(ValueError, match="no global_pool 'max'"):
        BiFormer(global_pool="max")


# ---- what timm asks
def make(**extra):
    torch.manual_seed(0)
    model = timm.create_model("biformer_tiny", **(SMALL | extra)).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_var.fill_(0.5)
    return model


def image(size=96, batch=1, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_checkpointing_changes_neither_output_nor_gradients():
    grads = []
    for on in (False, True):
        model = make(num_classes=42).train()
        model.set_grad_checkpointing(on)
        out = model(image(64, batch=2))
        out.square().sum().backward()
        grads.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a is not None and a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_default_configuration_describes_the_model():
    model, x = make(), image(224)
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *model.default_cfg["pool_size"])
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (1, model.head_hidden_size)
    for key in ("classifier", "first_conv"):
        assert f"{model.default_cfg[key]}.weight" in model.state_dict()
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), hidden)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (1, 7) and model.get_classifier().out_features == 7


@pytest.mark.parametrize(("channels", "classes"), [(1, 5), (3, 0)], ids=["grey, five classes", "no classes"])
def test_weights_adapt_to_other_channels_and_classes(channels, classes):
    options = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": make().state_dict()}, **SMALL}
    model = timm.create_model("biformer_tiny", in_chans=channels, num_classes=classes, **options).eval()
    assert model(image(channels=channels)).shape[-1] == (classes or model.num_features)


def test_features_and_intermediates_are_as_declared():
    model, x = make(), image()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    only = timm.create_model("biformer_tiny", features_only=True, **SMALL).eval()
    for y, z, level in zip(maps, only(x), model.feature_info, strict=True):
        assert y.shape == z.shape == (1, level["num_chs"], 96 // level["reduction"], 96 // level["reduction"])
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[1])
    model.prune_intermediate_layers([1], prune_norm=True)
    torch.testing.assert_close(model.forward_features(x), maps[1])
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


def test_traced_model_is_bit_exact():
    model, x = make(), image()
    leaves = {"leaf_modules": list(get_notrace_modules())}
    names, _ = get_graph_node_names(model, tracer_kwargs=leaves)
    graph = create_feature_extractor(model, [names[-1]], tracer_kwargs=leaves).eval()
    assert torch.equal(next(iter(graph(x).values())), model(x))


def test_torchscript_is_refused_in_a_sentence():
    with pytest.raises(RuntimeError, match=r"cannot be turned into TorchScript.*use torch\.compile"):
        torch.jit.script(make())


def test_every_parameter_belongs_to_a_group():
    model = make()
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sum(map(len, groups.values())) == len(list(model.parameters())) and len(groups) > 3


@torch.no_grad()
def test_any_picture_size_goes():
    model = make()
    for size in ((96, 128), (77, 101), (40, 33)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()
