"""Models of timm that are no plain ViT: accelerated where that is right, else left as they are, with the reason in one sentence."""

import pytest
import timm
import torch
from grid_oracle import attention, window_mask
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


def stepwise_masked(model, x, mask):
    """ConViT computes its softmax step by step, so the oracle stands in for the forward of its plain layers."""
    plain = [block.attn for block in model.blocks if type(block.attn).__name__ == "MHSA"]
    for attn in plain:

        def forward(x, attn=attn):
            q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return attn.proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))

        attn.forward = forward
    out = model(x)
    for attn in plain:
        del attn.forward
    return out


@torch.no_grad()
def test_convit_runs_its_plain_layers_sparse_and_leaves_the_gated_ones():
    """The class token joins between the two kinds of layers, so their sequences differ by one."""
    options = {"embed_dim": 16, "depth": 3, "local_up_to_layer": 1, "num_heads": 2, "img_size": 112}
    model = seeded(timm.create_model("convit_tiny", **options)).double().eval()
    x = torch.randn(1, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = stepwise_masked(model, x, sequence_mask(window_mask((7, 7), 3), 50, 1))
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
        assert handle.still_bound() == ["blocks.1.attn", "blocks.2.attn"]
        assert f"{BIAS} to the scores, which no plan carries: left alone in blocks.0.attn" in str(handle.summary())


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
