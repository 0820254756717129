"""Gated attention: against its formula, in timm's vision transformers, on pretrained weights, and under sparse methods."""

import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Attention, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import foveal
from foveal.vision.gated_attention import GatedAttention, HeadwiseGatedAttention, gate_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins"))
from grid_oracle import window_mask
from host_oracle import masked_attention, sequence_mask

KINDS = {"elementwise": GatedAttention, "headwise": HeadwiseGatedAttention}
NAMES = {"elementwise": "foveal.gated", "headwise": "foveal.gated_headwise"}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "patch_size": 8, "img_size": 56}
by_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind, dim=12, heads=3, **options):
    torch.manual_seed(0)
    made = KINDS[kind](dim, num_heads=heads, qkv_bias=True, **options).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
    return made


def tokens(n=7, dim=12, batch=2, dtype=torch.float64):
    return torch.randn(batch, n, dim, dtype=dtype, generator=torch.Generator().manual_seed(1))


def vit(kind=None, name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    options = TINY | ({} if kind is None else {"attn_layer": NAMES[kind]}) | options
    return timm.create_model(name, **options).eval()


def pictures(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 56, 56, dtype=dtype, generator=torch.Generator().manual_seed(2))


def by_the_formula(attn, x, mask):
    """Token by token, head by head. -> [B, N, C]"""
    heads, d = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).chunk(3, -1)
    gate = 1 / (1 + torch.exp(-torch.nn.functional.linear(x, attn.gate.weight, attn.gate.bias)))
    rows = torch.zeros_like(v)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for h in range(heads):
                own = slice(h * d, (h + 1) * d)
                scores = torch.stack([q[b, i, own] @ k[b, j, own] / math.sqrt(d) for j in range(x.shape[1])])
                weight = scores.masked_fill(~mask[i], -math.inf).softmax(0)
                rows[b, i, own] = (weight @ v[b, :, own]) * (
                    gate[b, i, h] if gate.shape[-1] == heads else gate[b, i, own]
                )
    return attn.proj(rows)


@by_kind
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "a mask"])
def test_equals_the_formula_and_so_do_the_gradients(kind, masked):
    attn, outs, grads = layer(kind), [], []
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else torch.ones(7, 7).bool()
    mask.fill_diagonal_(True)
    for run in (lambda x: attn(x, attn_mask=mask if masked else None), lambda x: by_the_formula(attn, x, mask)):
        x = tokens().requires_grad_()
        outs.append(run(x))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [x, *attn.parameters()]))
    torch.testing.assert_close(outs[0], outs[1], **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@by_kind
def test_stepwise_softmax_equals_the_fused_one(kind):
    attn, x = layer(kind), tokens()
    fused = attn(x)
    attn.fused_attn = False
    torch.testing.assert_close(attn(x), fused, **CLOSE)


@by_kind
def test_open_gates_are_plain_attention_and_closed_ones_nothing(kind):
    attn, x = layer(kind, dim=16, heads=2), tokens(dim=16)
    plain = Attention(16, num_heads=2, qkv_bias=True).double()
    plain.load_state_dict({n: w for n, w in attn.state_dict().items() if not n.startswith("gate.")})
    torch.nn.init.zeros_(attn.gate.weight)
    torch.nn.init.constant_(attn.gate.bias, math.inf)
    torch.testing.assert_close(attn(x), plain(x), **CLOSE)
    torch.nn.init.constant_(attn.gate.bias, -math.inf)
    torch.testing.assert_close(attn(x), attn.proj.bias.expand(2, 7, 16), **CLOSE)


def test_a_headwise_gate_is_an_elementwise_one_that_repeats_its_rows():
    attn, wide, x = layer("headwise"), layer("elementwise"), tokens()
    state = {n: w.repeat_interleave(4, 0) if n.startswith("gate.") else w for n, w in attn.state_dict().items()}
    wide.load_state_dict(state)
    torch.testing.assert_close(attn(x), wide(x), **CLOSE)


@pytest.mark.parametrize(("kind", "more"), [("elementwise", 12 * (192 * 192 + 192)), ("headwise", 12 * (192 * 3 + 3))])
def test_parameters_are_as_many_as_the_paper_says(kind, more):
    plain, gated = (
        timm.create_model("vit_tiny_patch16_224", device="meta", **o) for o in ({}, {"attn_layer": NAMES[kind]})
    )
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(gated) - count(plain) == more
    assert kind != "elementwise" or round(count(gated) / 1e6, 2) == 6.16


@by_kind
def test_checkpoints_of_plain_models_load_and_only_gates_are_new(kind):
    plain, gated = vit(), vit(kind)
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing == [f"blocks.{i}.attn.gate.{w}" for i in (0, 1) for w in ("weight", "bias")]
    again, x = vit(kind), pictures()
    again.load_state_dict(gated.state_dict())
    assert torch.equal(again(x), gated(x))


FAMILIES = {"vit": "vit_tiny_patch16_224", "registers": "vit_small_patch14_reg4_dinov2", "rope": "vit_small_patch16_dinov3", "eva": "eva02_tiny_patch14_224"}  # fmt: skip


@by_kind
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_gates_on_pretrained_models_change_little_and_open_ones_nothing(kind, name):
    model, x = vit(name=name), pictures()
    plain = model(x)
    names = gate_layers(model, kind)
    assert names == ["blocks.0.attn", "blocks.1.attn"]
    assert 0 < float((model(x) - plain).abs().max()) < 0.05 * float(plain.abs().max())
    for block in model.blocks:
        torch.nn.init.constant_(block.attn.gate.bias, math.inf)
    assert torch.equal(model(x), plain)


def test_bad_settings_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="30 is not divisible by 4 heads"):
        GatedAttention(30, num_heads=4)
    with pytest.raises(ValueError, match="no gate 'tokenwise'; choose from 'elementwise', 'headwise'"):
        gate_layers(vit(), "tokenwise")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has a gate already"):
        gate_layers(vit("headwise"))
    with pytest.raises(ValueError, match="ResNet has no attention layer that knows gates; supported are"):
        gate_layers(timm.create_model("resnet10t", device="meta"))


# ---- under sparse methods
@by_kind
@pytest.mark.parametrize("prefix", [0, 1, 5], ids="prefix-{}".format)
@torch.no_grad()
def test_sparse_methods_are_gated_as_the_plain_model_is(kind, prefix):
    tokens_before = {0: {"class_token": False, "global_pool": "avg"}, 1: {}, 5: {"reg_tokens": 4}}[prefix]
    model, x = vit(kind, **tokens_before).double(), pictures(dtype=torch.float64)
    plain = model(x)
    with masked_attention({49 + prefix: sequence_mask(window_mask((7, 7), 3), 49 + prefix, prefix)}) as seen:
        want = model(x)
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        torch.testing.assert_close(model(x), want, **CLOSE)
        assert handle.record.layers[0].dense_calls == 0
    assert seen and torch.equal(model(x), plain)


# ---- what timm asks
@by_kind
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(kind):
    grads = []
    for on in (False, True):
        model = vit(kind).train()
        model.set_grad_checkpointing(on)
        model(pictures()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None and a.isfinite().all()
        torch.testing.assert_close(a, b)


@by_kind
@torch.no_grad()
def test_traced_scripted_and_narrow_models_agree(kind):
    model, x = vit(kind), pictures()
    plain = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), plain)
    leaves = {"leaf_modules": list(get_notrace_modules())}
    graph = create_feature_extractor(
        model, [get_graph_node_names(model, tracer_kwargs=leaves)[0][-1]], tracer_kwargs=leaves
    )
    assert torch.equal(next(iter(graph.eval()(x).values())), plain)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), plain, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_ragged_batches_of_naflex_are_gated_too():
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("naflexvit_base_patch16_gap", attn_layer="foveal.gated_headwise", **options).eval()
    assert type(model.blocks[0].attn) is HeadwiseGatedAttention and model(torch.randn(1, 3, 48, 80)).isfinite().all()
