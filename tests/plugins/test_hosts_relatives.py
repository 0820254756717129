"""Models of diffusers that no one wrote a line for: recognised by what they show, and either right or dense by name."""

import diffusers as D
import pytest
import torch
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor
from grid_oracle import group_mask, window_mask
from host_oracle import masked_attention, sequence_mask
from tiny import flux_inputs, noise, run, wan_inputs

from foveal.plugins.accelerate import accelerate
from foveal.plugins.diffusers_host.families import recognise
from foveal.plugins.diffusers_host.roles import left_alone

pytestmark = pytest.mark.filterwarnings("ignore")
SPARSE = {
    "grat": ({"group": (1, 2, 2), "b": (1, 1, 0)}, group_mask),
    "neighborhood": ({"window": (1, 3, 3)}, window_mask),
}
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
    "text_dim": 32, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip


def _flux(kind, *without, **changes):
    model = kind(**{**FLUX, **changes})
    return model, {name: x for name, x in flux_inputs().items() if name not in without}


def chroma():
    small = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return _flux(D.ChromaTransformer2DModel, "pooled_projections", **small)


def bria():
    return _flux(D.BriaTransformer2DModel, "pooled_projections")


def longcat_image():
    return _flux(D.LongCatImageTransformer2DModel, "pooled_projections")


def ovis_image():
    return _flux(D.OvisImageTransformer2DModel, "pooled_projections")


def chronoedit():
    return D.ChronoEditTransformer3DModel(**WAN), wan_inputs()


def anyflow():
    """Its latents are [B, T, C, H, W]; the time that a step goes to is an argument of its own."""
    return D.AnyFlowTransformer3DModel(**WAN), _anyflow_inputs()


def _anyflow_inputs():
    latents = wan_inputs()["hidden_states"].transpose(1, 2).contiguous()
    times = {name: torch.full((1, 3), t) for name, t in (("timestep", 500), ("r_timestep", 250))}
    return {**wan_inputs(), **times, "hidden_states": latents}


RELATIVES = {  # its family, tokens of the grid, text tokens before them
    chroma: ("Flux", (1, 4, 6), 5),
    bria: ("Flux", (1, 4, 6), 5),
    longcat_image: ("Flux", (1, 4, 6), 5),
    ovis_image: ("Flux", (1, 4, 6), 5),
    chronoedit: ("Wan", (3, 4, 6), 0),
    anyflow: ("Wan", (3, 4, 6), 0),
}


def build(make):
    torch.manual_seed(0)
    model, inputs = make()
    return model.eval(), inputs


@pytest.mark.parametrize("method", sorted(SPARSE))
@pytest.mark.parametrize("make", RELATIVES, ids=lambda f: f.__name__)
def test_relatives_equal_the_masked_model(make, method):
    family, grid, text = RELATIVES[make]
    (model, inputs), (knobs, mask) = build(make), SPARSE[method]
    assert recognise(model).family.name == family
    plain, n = run(model, inputs), text + grid[0] * grid[1] * grid[2]
    with masked_attention({n: sequence_mask(mask(grid, **knobs), n, text)}) as seen:
        expected = run(*build(make))
    assert seen == {n} and not torch.allclose(expected, plain, atol=1e-5)
    handle = accelerate(model, method, **knobs)
    torch.testing.assert_close(run(model, inputs), expected, atol=2e-5, rtol=1e-4)
    assert handle.record.density() < 1 and handle.record.ran_dense_why() == []
    handle.remove()
    assert torch.equal(run(model, inputs), plain)


# ---- UNets of videos
def svd():
    model = D.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, in_channels=8, out_channels=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), num_attention_heads=8,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )  # fmt: skip
    inputs = {"sample": noise(1, 3, 8, 8, 12), "timestep": torch.tensor(10.0), "encoder_hidden_states": noise(1, 1, 32)}
    return model, {**inputs, "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]])}


def unet3d():
    model = D.UNet3DConditionModel(
        block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return model, {
        "sample": noise(1, 4, 3, 8, 12),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": noise(1, 4, 8),
    }


@pytest.mark.parametrize("make", [svd, unet3d], ids=lambda f: f.__name__)
def test_unets_of_videos_are_sparse_in_space_and_dense_in_time(make):
    model, inputs = build(make)
    plain, (knobs, mask) = run(model, inputs), SPARSE["grat"]
    levels = [(1, 8, 12), (1, 4, 6)]
    masks = {h * w: sequence_mask(mask((1, h, w), **knobs), h * w, 0) for _, h, w in levels}
    with masked_attention(masks) as seen:
        expected = run(*build(make))
    assert seen == set(masks) and not torch.allclose(expected, plain, atol=1e-5)
    handle = accelerate(model, "grat", **knobs)
    torch.testing.assert_close(run(model, inputs), expected, atol=2e-5, rtol=1e-4)
    assert {row.role for row in handle.record.layers if row.calls} == {"self"}
    assert [why["count"] for why in handle.record.ran_dense_why()] == [0], "the temporal layers are left alone, by name"
    handle.remove()
    assert torch.equal(run(model, inputs), plain)


# ---- processors that go their own way
def anyflow_far():
    """A causal video model whose self-attention takes one backend only."""
    model = D.AnyFlowFARTransformer3DModel(**{**WAN, "attention_head_dim": 16}, chunk_partition=(1, 2))
    return model, {**_anyflow_inputs(), "chunk_partition": [1, 2]}


def test_a_processor_of_one_backend_is_left_alone_by_name():
    model, inputs = build(anyflow_far)
    plain = run(model, inputs)
    handle = accelerate(model, "grat", group=(1, 2, 2), b=0)
    assert torch.equal(run(model, inputs), plain)
    (why,) = handle.record.ran_dense_why()
    assert why["reason"] == left_alone(AnyFlowCausalAttnProcessor()) and "flex" in why["reason"]
    assert why["count"] == 0 and len(why["layers"]) == 2 and str(handle.summary()).count(why["reason"]) == 1
