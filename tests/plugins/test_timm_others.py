"""Models of timm that are no plain ViT: accelerated where that is right, else left as they are, with the reason in one sentence."""

from functools import partial

import pytest
import timm
import torch
from grid_oracle import attention, group_mask, window_mask
from host_oracle import masked_attention, sequence_mask
from timm_families import fingerprint, seeded

import foveal
from foveal.plugins.accelerate import AccelerateError

NO_GRID = "one grid of patches"
BIAS = "position bias of its own"
# name -> (timm's name, options, what the refusal says)
LEFT_ALONE = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}, NO_GRID),
    "halonet": ("halonet26t", {}, NO_GRID),
    "botnet": ("botnet26t_256", {}, NO_GRID),
    "shvit": ("shvit_s1", {}, NO_GRID),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {}, NO_GRID),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 1, 1), "num_heads": 1}, NO_GRID),
    "pit": ("pit_ti_224", {}, NO_GRID),
    "xcit": ("xcit_nano_12_p16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2}, "not attention of all tokens"),
    "cait": ("cait_xxs24_224", {"embed_dim": 16, "depth": 2, "num_heads": 2}, "TalkingHeadAttn"),
    "beit": ("beit_base_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2}, BIAS),
    "relpos": ("vit_relpos_small_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2}, BIAS),
    "sam": ("samvit_base_patch16", {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 64}, BIAS),
    "differential": ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2, "attn_layer": "diff"}, "DiffAttention"),
    "parallel-blocks": ("vit_base_patch16_xp_224", {"embed_dim": 16, "depth": 2, "num_heads": 2}, "ParallelScalingBlock"),
    "resnet": ("resnet10t", {}, NO_GRID),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_accelerated_is_left_as_it_is_and_says_why(name):
    timms, options, reason = LEFT_ALONE[name]
    with (
        torch.device("meta")
        if timms in ("halonet26t", "botnet26t_256", "maxvit_rmlp_pico_rw_256")
        else torch.device("cpu")
    ):
        model = timm.create_model(timms, **options)
    before = fingerprint(model)
    with pytest.raises(AccelerateError, match=reason) as error:
        foveal.accelerate(model, "neighborhood", window=3)
    assert str(error.value).startswith(type(model).__name__) and str(error.value).endswith(".")
    assert fingerprint(model) == before and foveal.handle_of(model) is None


HALOS = ("eca_halonext26ts", "halo2botnet50ts_256", "halonet26t", "halonet50ts", "halonet_h1", "haloregnetz_b", "lamhalobotnet50ts_256", "sehalonet33ts")  # fmt: skip
NO_LAYERS = "no attention layers that can be recognised"
# family -> (models, what the refusal says of their layers)
FAMILIES_OF_OTHERS = {
    "halonet": (HALOS, rf"HaloAttn \(\d+ layers\): it adds a {BIAS}"),
    "convit, all gated": (("convit_tiny", "convit_small", "convit_base"), rf"GPSA \(2 layers\): it adds a {BIAS}"),
    "shvit": (("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"), NO_LAYERS),
}


@pytest.mark.parametrize("family", FAMILIES_OF_OTHERS)
def test_whole_families_are_left_alone_in_one_sentence(family):
    names, reason = FAMILIES_OF_OTHERS[family]
    for name in names:
        options = {"depth": 2, "local_up_to_layer": 2} if family.startswith("convit") else {}
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        for method, knobs in (("neighborhood", {"window": 3}), ("grat", {"group": (1, 4, 4)}), ("dense", {})):
            with pytest.raises(AccelerateError, match=reason) as error:
                foveal.accelerate(model, method, **knobs)
            assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


@pytest.mark.parametrize(("name", "size"), [("halonet26t", 256), ("shvit_s1", 64), ("convit_tiny", 224)])
@torch.no_grad()
def test_a_refused_model_computes_what_it_did(name, size):
    options = {"depth": 1, "local_up_to_layer": 1, "embed_dim": 16, "num_heads": 2} if name == "convit_tiny" else {}
    model = timm.create_model(name, **options).eval()
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain, before = model(x), fingerprint(model)
    with pytest.raises(AccelerateError):
        foveal.accelerate(model, "neighborhood", window=3)
    assert torch.equal(model(x), plain) and fingerprint(model) == before


def convit_by_the_formula(model, x, mask):
    """All tokens after ConViT's last norm, its layers restated: plain ones masked; gated ones mix softmax over scores and over positions."""
    replaced = [block.attn for block in model.blocks]
    for attn in replaced:
        attn.forward = partial(plain_layer if hasattr(attn, "qkv") else gated_layer, attn, mask=mask)
    out = model.forward_features(x)
    for attn in replaced:
        del attn.forward
    return out


def plain_layer(attn, x, mask):
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))


def gated_layer(attn, x, mask):
    side = round(x.shape[1] ** 0.5)
    row, column = (t.flatten().to(x) for t in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    dx, dy = column[None] - column[:, None], row[None] - row[:, None]
    place = attn.pos_proj(torch.stack([dx, dy, dx**2 + dy**2], -1)).permute(2, 0, 1).softmax(-1)
    q, k = attn.qk(x).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    share = attn.gating_param.sigmoid()[:, None, None]
    weight = (1 - share) * (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) + share * place
    v = attn.v(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return attn.proj((weight / weight.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


CONVIT_METHODS = {
    "neighborhood": ({"window": 3}, lambda: window_mask((7, 7), 3)),
    "grat": ({"group": (1, 4, 4), "b": 0}, lambda: group_mask((7, 7), (4, 4), "B", 0)),  # with a token order of its own
}


@pytest.mark.parametrize("gated", [0, 1, 2], ids="{} gated layers".format)
@pytest.mark.parametrize("method", CONVIT_METHODS)
@torch.no_grad()
def test_convit_runs_its_plain_layers_sparse_and_leaves_the_gated_ones(method, gated):
    """The class token joins between the two kinds of layers, so their sequences differ by one."""
    options = {"embed_dim": 16, "depth": 3, "local_up_to_layer": gated, "num_heads": 2, "img_size": 112}
    model = seeded(timm.create_model("convit_tiny", **options)).double().eval()
    x = torch.randn(1, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    knobs, mask = CONVIT_METHODS[method]
    plain, dense = model.forward_features(x), convit_by_the_formula(model, x, torch.ones(50, 50, dtype=torch.bool))
    torch.testing.assert_close(dense, plain, rtol=1e-9, atol=1e-9)
    want = convit_by_the_formula(model, x, sequence_mask(mask(), 50, 1))
    with foveal.accelerate(model, method, **knobs) as handle:
        torch.testing.assert_close(model.forward_features(x), want, rtol=1e-9, atol=1e-9)
        assert handle.still_bound() == [f"blocks.{i}.attn" for i in range(gated, 3)]
        assert {row.dense_calls for row in handle.record.layers if row.left_alone is None} == {0}
        for i in range(gated):
            assert f"{BIAS} to the scores, which no plan carries: left alone in" in str(handle.summary())
            assert f"blocks.{i}.attn" in str(handle.summary())
    assert (plain - want).abs().max() > 1e-4 and torch.equal(model.forward_features(x), plain)


@torch.no_grad()
def test_a_convolutional_stem_before_the_blocks_changes_nothing():
    model = timm.create_model("vit_small_r26_s32_224", embed_dim=32, depth=2, num_heads=2).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with masked_attention({50: sequence_mask(window_mask((7, 7), 3), 50, 1)}) as seen:
        want = model(x)
    assert seen == {50}
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        assert handle.record.layers[0].dense_calls == 0


@torch.no_grad()
def test_feature_extraction_runs_sparse():
    model = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, embed_dim=32, depth=3, num_heads=2, img_size=112
    )
    x = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    seeded(model).eval()
    with masked_attention({50: sequence_mask(window_mask((7, 7), 3), 50, 1)}):
        want = model(x)
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        for got, level in zip(model(x), want, strict=True):
            torch.testing.assert_close(got, level, rtol=1e-4, atol=1e-4)
        assert {row.dense_calls for row in handle.record.layers} == {0}


@torch.no_grad()
def test_attention_pooling_stays_dense_and_is_named():
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 96}
    model = timm.create_model("vit_base_patch16_siglip_224", **options).eval()
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        model(torch.randn(1, 3, 96, 96))
        assert handle.still_bound() == ["blocks.0.attn"]
        assert "pools the tokens" in str(handle.summary()) and "left alone in attn_pool" in str(handle.summary())
