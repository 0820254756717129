"""Every transformer of the zoo under every static method: dense settings are the plain model, sparse ones are their definition."""

import diffusers
import pytest
import torch
import zoo
import zoo_images
from grid_oracle import group_mask, window_mask
from host_oracle import masked_attention, sequence_mask
from tiny import noise, run
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.plugins.accelerate import AccelerateError, accelerate, handle_of
from foveal.plugins.diffusers_host.processors import GRATAttnProcessor, NeighborhoodAttnProcessor

pytestmark = pytest.mark.filterwarnings("ignore")
SPARSE = {"grat": {"group": (1, 2, 2), "b": (1, 1, 0)}, "neighborhood": {"window": (1, 3, 3)}}
FULL = {"grat": {"group": (1, 2, 2), "b": -1}, "neighborhood": {"window": -1}}
DENSE = {"grat": {"pattern": "dense"}, "neighborhood": {"window": 1, "dense_steps": 9}}
TEMPLATES = {"grat": GRATAttnProcessor, "neighborhood": NeighborhoodAttnProcessor}
NAMES = sorted(zoo.SHAPES)


def oracle(name, method, model, inputs):
    """The plain model with its attention calls masked token by token."""
    shape = zoo.SHAPES[name]
    grid_mask = {"grat": group_mask, "neighborhood": window_mask}[method](shape.grid, **SPARSE[method])
    masks = {
        length: sequence_mask(grid_mask, length, text if shape.text_first else 0)
        for length, text in shape.sequences().items()
    }
    with masked_attention(masks) as seen:
        out = run(model, inputs)
    assert seen, "no attention call was masked"
    return out


def noise_floor(model, inputs, plain):
    """How far the plain model is from itself with another SDPA backend; never less than a few roundings."""
    with sdpa_kernel(SDPBackend.MATH):
        other = run(model, inputs)
    return max((other - plain).abs().max().item(), 4 * torch.finfo(plain.dtype).eps * plain.abs().max().item())


@pytest.mark.parametrize("method", sorted(SPARSE))
@pytest.mark.parametrize("name", NAMES)
def test_sparse_settings_equal_the_masked_model_by_every_way_in(name, method):
    model, inputs = zoo.build(name)
    plain, expected = run(model, inputs), oracle(name, method, *zoo.build(name))
    assert not torch.allclose(expected, plain, atol=1e-4), "the method must matter for this test to mean something"
    handle = accelerate(model, method, **SPARSE[method])
    sparse = run(model, inputs)
    torch.testing.assert_close(sparse, expected, atol=2e-5, rtol=1e-4)
    assert handle.record.density() < 1 and handle.record.ran_dense_why() == []
    handle.order_hook = False
    torch.testing.assert_close(run(model, inputs), sparse, atol=2e-5, rtol=1e-4)
    handle.remove()
    model.set_attn_processor(TEMPLATES[method](**SPARSE[method]))
    assert torch.equal(run(model, inputs), sparse)
    handle_of(model).remove()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("method", sorted(FULL))
@pytest.mark.parametrize("name", NAMES)
def test_full_settings_equal_the_plain_model_within_the_noise_floor(name, method):
    model, inputs = zoo.build(name)
    plain = run(model, inputs)
    floor = noise_floor(model, inputs, plain)
    with accelerate(model, method, **FULL[method]) as handle:
        difference = (run(model, inputs) - plain).abs().max().item()
        assert handle.record.density() == pytest.approx(1) or zoo.SHAPES[name].valid
    assert difference <= 4 * floor
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_route_is_the_plain_model_to_the_bit(name):
    model, inputs = zoo.build(name)
    plain = run(model, inputs)
    for method, knobs in DENSE.items():
        handle = accelerate(model, method, **knobs)
        out = run(model, inputs)
        assert torch.equal(out, plain) or not zoo.SHAPES[name].exact
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
        (why,) = handle.record.ran_dense_why()
        assert why["count"] == sum(row.calls for row in handle.record.layers) > 0


# ---- prompts of different length in one batch
def ragged(name):
    """-> model, a batch of two prompts of different length, each prompt alone without padding"""
    torch.manual_seed(0)
    if name == "zimage":
        model, both = zoo_images._zimage((1, 5, 7), (70, 20))
        return model.eval(), both, [{k: v[i : i + 1] for k, v in both.items()} for i in range(2)]
    model, both = zoo.build(name)
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    both |= {
        "hidden_states": noise(2, 24, 16),
        "encoder_hidden_states": noise(2, 8, 16, seed=2),
        "timestep": torch.ones(2),
    }
    both |= {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, 4, 6)]] * 2}
    alone = [{k: v[i : i + 1] for k, v in both.items()} for i in range(2)]
    for inputs, n in zip(alone, (8, 3), strict=True):
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :n]
        inputs["encoder_hidden_states_mask"] = None
    return model, both, alone


def outputs(model, inputs):
    with torch.no_grad():
        return list(model(**inputs, return_dict=False)[0])


@pytest.mark.parametrize("method", sorted(SPARSE))
@pytest.mark.parametrize("name", ["zimage", "qwen"])
def test_a_batch_of_ragged_prompts_equals_each_prompt_alone(name, method):
    model, both, alone = ragged(name)
    plain = outputs(model, both)
    handle = accelerate(model, method, **SPARSE[method])
    together = outputs(model, both)
    assert handle.record.ran_dense_why() == [] and not torch.allclose(together[1], plain[1], atol=1e-4)
    for out, inputs in zip(together, alone, strict=True):
        torch.testing.assert_close(outputs(model, inputs)[0], out, atol=2e-5, rtol=1e-4)


# ---- models that diffusers gave no set_attn_processor
BARE = {"mochi": "MochiPipeline", "zimage": "ZImagePipeline", "cosmos": "CosmosTextToWorldPipeline"}


@pytest.mark.parametrize("name", sorted(BARE))
def test_models_without_set_attn_processor_take_ours_and_no_other(name):
    model, _ = zoo.build(name)
    assert not isinstance(model, diffusers.models.attention.AttentionMixin)
    with pytest.raises(AccelerateError, match="takes foveal's processors only"):
        model.set_attn_processor(object())
    assert handle_of(model) is None


@pytest.mark.parametrize("name", sorted(BARE))
def test_their_pipelines_take_ours_too(name):
    model, inputs = zoo.build(name)
    pipe = getattr(diffusers, BARE[name]).__new__(getattr(diffusers, BARE[name]))
    diffusers.DiffusionPipeline.__init__(pipe)
    pipe.register_modules(transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.set_attn_processor(GRATAttnProcessor(**SPARSE["grat"]))
    handle = handle_of(pipe)
    assert handle is handle_of(model) and handle.still_bound()[0].startswith("transformer.")
    run(model, inputs)
    assert handle.record.density() < 1
    with pytest.raises(AccelerateError, match=r"transformer \(\w+\) has no set_attn_processor"):
        pipe.set_attn_processor(object())
    handle.remove()
