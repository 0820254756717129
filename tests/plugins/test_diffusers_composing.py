"""What cannot compose says so in time, and leaves everything as it was; what composes only in one order works in that order."""

import copy
import inspect
import warnings

import diffusers as D
import pytest
import torch
from conditions import Case, fuse_qkv, ip_adapter, mag_cache, pyramid_attention_broadcast
from fakes import Spy
from tiny import noise, run, wan_inputs, wan_transformer
from tiny_pipes import METHODS

from foveal.plugins.accelerate import AccelerateError, accelerate
from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.caches import refusal
from foveal.plugins.diffusers_host.composition import IP_ADAPTER_FIRST, NO_CONTEXT_PARALLEL

pytestmark = pytest.mark.filterwarnings("ignore")
GRAT = METHODS["grat"]


# ---- caches that mix guidance passes up
@pytest.mark.parametrize("host", ["flux", "hunyuan", "flux-kontext"])
def test_pyramid_broadcast_is_refused_when_guidance_takes_two_passes(host):
    case = Case.of(host)
    handle = accelerate(case.pipe, "grat", **GRAT)
    pyramid_attention_broadcast(case)
    case.run()
    case.options["two_passes"] = True
    with pytest.raises(AccelerateError, match="PyramidAttentionBroadcast keeps one output per layer"):
        case.run()
    case.models[0].disable_cache()
    sparse = case.run()
    handle.remove()
    fresh = Case.of(host)
    fresh.steps, fresh.options = case.steps, case.options
    accelerate(fresh.pipe, "grat", **GRAT)
    assert torch.equal(sparse, fresh.run()), "the refused run leaves nothing behind"


def test_mag_cache_needs_a_context_where_guidance_takes_two_passes():
    with_context, without = Case.of("flux"), Case.of("flux-kontext")
    for case in (with_context, without):
        accelerate(case.pipe, "dense")
        mag_cache(case)
        case.options["two_passes"] = True
    with_context.run()
    with pytest.raises(AccelerateError, match="MagCache keeps one output per layer"):
        without.run()


@pytest.mark.parametrize(("batch", "distilled", "refused"), [(1, False, True), (2, False, False), (1, True, False)])
def test_faster_cache_needs_both_halves_in_one_batch(batch, distilled, refused):
    config = D.FasterCacheConfig(is_guidance_distilled=distilled, current_timestep_callback=lambda: 500)
    why = refusal(config, {"hidden_states": torch.zeros(batch, 4)}, False, "cond")
    assert bool(why) == refused
    assert not refused or f"this call has {batch} sample(s)" in why


def test_no_cache_and_other_caches_are_never_refused():
    for config in (None, D.FirstBlockCacheConfig(), D.TaylorSeerCacheConfig()):
        assert refusal(config, {"hidden_states": torch.zeros(1, 4)}, True, None) is None


# ---- processors that diffusers replaces
def test_a_run_after_fusing_warns_once_and_accelerating_again_helps():
    case = Case.of("cogvideox")
    plain = case.run()
    handle = accelerate(case.pipe, "grat", **GRAT)
    sparse = case.run()
    fuse_qkv(case)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert torch.equal(case.run(), plain), "dense"
    assert [str(w.message)[:44] for w in seen if "hold another" in str(w.message)] == [
        "2 of 2 layers hold another processor now; ca"
    ]
    assert "2 of 2 layers hold another processor now" in str(handle.summary())
    again = accelerate(case.pipe, "grat", **GRAT)
    assert torch.equal(case.run(), sparse) and again.is_active()
    again.remove()
    assert torch.equal(case.run(), plain)


def test_unfusing_puts_ours_back():
    case = Case.of("sd3")
    handle = accelerate(case.pipe, "grat", **GRAT)
    sparse = case.run()
    fuse_qkv(case)
    case.models[0].unfuse_qkv_projections()
    assert handle.is_active() and torch.equal(case.run(), sparse)


@pytest.mark.parametrize("host", ["flux", "sd15"])
def test_an_ip_adapter_loaded_too_late_changes_nothing(host):
    case = Case.of(host)
    handle = accelerate(case.pipe, "grat", **GRAT)
    sparse = case.run()
    with pytest.raises(AccelerateError) as caught:
        ip_adapter(case)
    assert str(caught.value) == IP_ADAPTER_FIRST
    assert handle.is_active() and torch.equal(case.run(), sparse)


def test_layers_that_hold_an_ip_adapter_are_named_and_the_others_run_sparse():
    case = Case.of("flux")
    ip_adapter(case)
    handle = accelerate(case.pipe, "grat", **GRAT)
    case.run()
    left = {row.name for row in handle.record.layers if row.left_alone}
    assert left == {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
    assert handle.still_bound() == [f"transformer.single_transformer_blocks.{i}.attn" for i in range(2)]
    assert handle.record.density() < 1 and "weights of its own" in str(handle.summary())


# ---- many devices
def test_splitting_tokens_is_refused_before_the_model_is_touched():
    model, inputs = wan_transformer(), wan_inputs()
    handle = accelerate(model, "grat", **GRAT)
    sparse = run(model, inputs)
    with pytest.raises(AccelerateError) as caught:
        model.enable_parallelism(config=D.ContextParallelConfig(ulysses_degree=2))
    assert str(caught.value) == NO_CONTEXT_PARALLEL
    assert model._parallel_config is None and torch.equal(run(model, inputs), sparse)
    handle.remove()
    assert "enable_parallelism" not in model.__dict__


def test_splitting_weights_is_left_to_diffusers():
    assert private.splits_tokens(D.ContextParallelConfig(ring_degree=2))
    assert private.splits_tokens(D.ParallelConfig(context_parallel_config=D.ContextParallelConfig(ulysses_degree=2)))
    assert not private.splits_tokens(D.TensorParallelConfig(tp_degree=2))


# ---- the scheduler
def test_a_copy_of_a_followed_scheduler_is_a_scheduler_of_its_own():
    case, spy = Case.of("wan"), Spy()
    scheduler = case.pipe.scheduler
    signature = inspect.signature(scheduler.set_timesteps)
    accelerate(case.pipe, spy)
    assert inspect.signature(scheduler.set_timesteps) == signature
    scheduler.set_timesteps(5)
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(3)
    assert (len(scheduler.timesteps), len(twin.timesteps)) == (5, 3)
    assert twin.set_timesteps.__self__ is twin


# ---- a whole UNet as one graph
def small_unet():
    torch.manual_seed(0)
    return D.UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None, cross_attention_dim=16, norm_num_groups=2,
        attention_head_dim=4,
    ).eval()  # fmt: skip


def test_levels_of_a_compiled_unet_know_their_grid_from_the_first_call_on(fresh_compiler):
    """Also where another grid has as many tokens: 8 x 12 after 12 x 8."""
    inputs = [
        {"sample": noise(1, 4, *size), "timestep": torch.tensor(5), "encoder_hidden_states": noise(1, 6, 16)}
        for size in ((12, 8), (8, 12), (12, 8))
    ]
    model = small_unet()
    with accelerate(model, "neighborhood", window=(1, 3, 5)):
        eager = [run(model, one) for one in inputs]
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    handle = accelerate(compiled, "neighborhood", window=(1, 3, 5))
    for one, expected in zip(inputs, eager, strict=True):
        torch.testing.assert_close(run(compiled, one), expected, atol=1e-6, rtol=1e-5)
    assert [(row.calls, row.dense_calls) for row in handle.record.layers] == [(3, 0)] * 3


# ---- a real second device
@pytest.mark.gpu
@pytest.mark.parametrize("first", ["offload", "attach"])
@pytest.mark.parametrize("offload", ["model", "sequential", "group-block", "group-leaf", "group-stream"])
@pytest.mark.parametrize("host", ["wan", "flux", "sd15", "cogvideox"])
def test_offloading_to_a_gpu(host, offload, first):
    import conditions

    turn_on = {
        "model": conditions.model_offload, "sequential": conditions.sequential_offload,
        "group-block": conditions.group_offload_block, "group-leaf": conditions.group_offload_leaf,
        "group-stream": conditions.group_offload_stream,
    }[offload]  # fmt: skip

    def result(method, condition=None):
        case = Case.of(host)
        case.device = torch.device("cuda", 0)
        if condition is None:
            case.pipe.to("cuda")
        elif first == "offload":
            condition(case)
        handle = None if method is None else accelerate(case.pipe, method, **METHODS[method])
        if condition is not None and first == "attach":
            condition(case)
        out = case.run().cpu()
        return out, handle

    alone, _ = result(None, turn_on)
    dense, _ = result("dense", turn_on)
    assert torch.equal(dense, alone)
    sparse, handle = result("grat", turn_on)
    plain, _ = result("grat")
    torch.testing.assert_close(sparse, plain, atol=1e-4, rtol=1e-4)
    assert handle.record.density() < 1
