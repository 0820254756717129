"""Where the order of tokens is applied, what counts as token attention, and wrappers around the model."""

import pytest
import torch
from grid_oracle import window_mask
from host_oracle import masked_attention, sequence_mask
from timm.layers import Attention
from timm.models.eva import Eva
from timm_families import build, picture, seeded

import foveal
from foveal.plugins.accelerate import AccelerateError
from foveal.plugins.handle import Handle

GRID = (13, 17)
ONCE, EVERY = "tokens are put in order once per model call", "tokens are put in order at every attention call"


class Lending(torch.nn.Module):
    """A wrapper that lends every attribute of what it wraps, as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args):
        return self.inner.forward(*args)


class Squared(Attention):
    """Has every part of token attention and computes something else."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x * x)


@pytest.mark.parametrize("family", ["vit", "deit-distilled", "dinov3", "rope-mixed", "siglip", "naflex"])
@torch.no_grad()
def test_once_per_model_call_equals_once_per_attention_call(family):
    model, x = build(family, GRID), picture(GRID)
    with foveal.accelerate(model, "neighborhood", window=5) as handle:
        once = model(x)
        assert ONCE in str(handle.summary())
        assert handle.record.layers[0].facts.plan.ordered and handle.order_hook
        handle.reset()
        handle.record.notes.clear()
        handle.order_hook = False
        torch.testing.assert_close(model(x), once, rtol=1e-9, atol=1e-9)
        assert ONCE not in str(handle.summary()) and f"{EVERY}, because order_hook is off" in str(handle.summary())
        assert not handle.record.layers[0].facts.plan.ordered


@torch.no_grad()
def test_who_looks_into_the_blocks_sees_tokens_in_the_models_order():
    model, x = build("dinov3", GRID), picture(GRID)
    seen = []
    with foveal.accelerate(model, "grat", group=(1, 4, 4)) as handle:
        want = model.forward_intermediates(x, indices=[0], intermediates_only=True, output_fmt="NLC")[0]
        hook = model.blocks[0].register_forward_hook(lambda _, args, out: seen.append(out[:, 5:]))
        model(x)
        hook.remove()
        torch.testing.assert_close(seen[0], want, rtol=1e-9, atol=1e-9)
        assert "a hook looks into the blocks" in str(handle.summary())


def test_plans_made_for_inference_can_be_trained_through():
    model, x = build("dinov3", (11, 12)), picture((11, 12))
    with foveal.accelerate(model, "neighborhood", window=3, stride=3):
        with torch.inference_mode():
            want = model(x)
        got = model(x)
        got.sum().backward()
    assert torch.equal(got, want) and model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_wrapper_that_lends_attributes_is_not_taken_for_the_model():
    outer, x = Lending(build("vit", GRID)), picture(GRID)
    with foveal.accelerate(outer, "neighborhood", window=5) as handle:
        assert handle.still_bound() == ["inner.blocks.0.attn", "inner.blocks.1.attn"]
        outer(x)
        assert handle.record.ran_dense_why() == [] and handle.record.density() < 0.2


@torch.no_grad()
def test_attention_that_computes_something_else_is_left_alone_whatever_its_parts():
    model, x = build("vit", GRID), picture(GRID)
    model.blocks[1].attn.__class__ = Squared
    with foveal.accelerate(model, "neighborhood", window=5) as handle:
        model(x)
        assert handle.still_bound() == ["blocks.0.attn"]
        assert handle.record.layers[1].left_alone == "it computes something else than softmax attention over its tokens"
        assert f"{EVERY}, because blocks.1.attn depends on where its tokens lie" in str(handle.summary())
    model.blocks[0].attn.__class__ = Squared
    with pytest.raises(AccelerateError, match=r"left as it is: Squared \(2 layers\)"):
        foveal.accelerate(model, "neighborhood", window=5)


def test_choosing_layers_and_roles_refuses_what_is_not_there():
    model = build("vit", GRID)
    with pytest.raises(AccelerateError, match="layer outside 0 to 1"):
        foveal.accelerate(model, "dense", layers=[2])
    with pytest.raises(AccelerateError, match=r"selects none of the 2 attention layers of VisionTransformer"):
        foveal.accelerate(model, "dense", layers="nothing.*")
    with pytest.raises(AccelerateError, match="self-attention only"):
        foveal.accelerate(model, "dense", roles=("cross",))
    with pytest.raises(foveal.MethodError, match="grid 1x13x17"):
        foveal.accelerate(build("vit", GRID, dynamic_img_size=False), "neighborhood", window=15)
    assert foveal.handle_of(model) is None


@torch.no_grad()
def test_the_handle_is_the_one_of_every_host():
    model, x = build("siglip", GRID), picture(GRID)
    with foveal.accelerate(model, "neighborhood", window=5, layers=lambda name: "1" in name) as handle:
        assert type(handle) is Handle and handle.is_active()
        assert handle.settings["layers"] == ["blocks.1.attn"]
        model(x)
        assert handle.state_bytes() == 0 and set(handle.state) == {("blocks.1.attn", None)}
        assert handle.record.to_dict()["transformer_seconds"] > 0
    assert not handle.still_bound()


@torch.no_grad()
def test_grouped_key_heads_and_norms_equal_the_masked_model():
    """Separate projections, fewer key heads, q and k norms, half-rotated RoPE: what the largest models of timm have."""
    options = {
        "attn_type": "rope",
        "qkv_fused": False,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "qk_norm": True,
    }
    model = Eva(
        (104, 136),
        8,
        embed_dim=64,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        num_reg_tokens=4,
        use_rot_pos_emb=True,
        **options,
    )
    model, x, n = seeded(model).double().eval(), picture(GRID), GRID[0] * GRID[1] + 5
    with masked_attention({n: sequence_mask(window_mask(GRID, 5), n, 5)}):
        want = model(x)
    with foveal.accelerate(model, "neighborhood", window=5) as handle:
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
        assert handle.record.layers[0].dense_calls == 0
    assert (model(x) - want).abs().max() > 1e-4
