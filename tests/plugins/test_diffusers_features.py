"""Attaching lives with the rest of diffusers: backends, copies, offloading, threads, caches, files."""

import copy

import pytest
import torch
import zoo
from fakes import Masked, Spy
from tiny import MODELS, flux_inputs, flux_transformer, run, wan_inputs, wan_transformer

from foveal.plugins.accelerate import AccelerateError, accelerate, handle_of
from foveal.plugins.methods.dense import Dense

REQUIRED = sorted(MODELS)


def processors(model):
    return {name: m.processor for name, m in model.named_modules() if getattr(m, "processor", None) is not None}


def test_attn_processors_round_trip():
    model, inputs = zoo.build("wan")
    handle = accelerate(model, Masked())
    sparse = run(model, inputs)
    model.set_attn_processor(dict(model.attn_processors))
    assert handle.is_active()
    assert torch.equal(run(model, inputs), sparse)


def test_attention_backend_can_be_chosen_after_attaching():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model, inputs = zoo.build("wan")
    plain, spy = run(model, inputs), Spy()
    accelerate(model, spy)
    try:
        model.set_attention_backend("native")
        assert torch.equal(run(model, inputs), plain)
        model.set_attention_backend("foveal")
        assert torch.equal(run(model, inputs), plain)
        model.reset_attention_backend()
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert len(spy.seen) == 4


def test_context_parallelism_is_refused():
    model = wan_transformer()
    accelerate(model, Spy())
    with pytest.raises(AccelerateError, match="context parallelism"):
        model.blocks[0].attn1.processor._parallel_config = object()
    model = wan_transformer()
    model._parallel_config = object()
    with pytest.raises(AccelerateError, match="context parallelism"):
        accelerate(model, Spy())


def test_deep_copies_are_plain_models_of_their_own():
    model, inputs = zoo.build("wan")
    plain = run(model, inputs)
    handle = accelerate(model, Masked(reach=0, shuffle=True))
    sparse, twin = run(model, inputs), copy.deepcopy(model)
    assert handle_of(twin) is None
    assert not any("Foveal" in type(p).__name__ for p in processors(twin).values())
    assert torch.equal(run(twin, inputs), plain)
    with torch.no_grad():
        twin.proj_out.weight.zero_()
    with twin.cache_context("cond"):
        assert not torch.equal(run(twin, inputs), plain)
    assert torch.equal(run(model, inputs), sparse)
    with accelerate(twin, Spy()):
        assert handle.is_active()


def test_offloading_after_attaching_keeps_steps_and_grids():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs = zoo.build("wan")
    plain, spy = run(model, inputs), Spy(shuffle=True)
    add_hook_to_module(model, ModelHook())
    handle = accelerate(model, spy)
    for action in (remove_hook_from_module, lambda m: add_hook_to_module(m, ModelHook())):
        action(model)  # diffusers does both between two runs of a pipeline with model offload
        torch.testing.assert_close(run(model, inputs), plain, atol=1e-5, rtol=1e-5)
    assert [site.step for site, _ in spy.seen] == [0, 0, 1, 1] and all(site.ordered for site, _ in spy.seen)
    handle.remove()
    assert torch.equal(run(model, inputs), plain)


def test_attention_outside_a_model_call_runs_dense():
    model, inputs = zoo.build("wan")
    handle = accelerate(model, Masked(reach=0))
    run(model, inputs)
    block, x = model.blocks[0], torch.randn(1, 72, 32)
    with torch.no_grad():
        block.attn1(x, None, None, None)
    (item,) = handle.record.ran_dense_why()
    assert item["reason"] == "attention outside a call of the whole model"


def test_a_failed_call_leaves_no_trace():
    model, inputs = zoo.build("wan")
    handle = accelerate(model, Masked(shuffle=True))
    expected = run(model, inputs)
    with pytest.raises(RuntimeError):
        run(model, {**inputs, "encoder_hidden_states": torch.zeros(1, 3, 5)})
    x = inputs["hidden_states"]
    assert torch.equal(model.patch_embedding(x), zoo.build("wan")[0].patch_embedding(x))
    assert torch.equal(run(model, inputs), expected)
    assert not model.__dict__["_foveal"].frame.active and handle.is_active()


def test_two_models_run_in_two_threads():
    from concurrent.futures import ThreadPoolExecutor

    made = [zoo.build(name) for name in ("wan", "flux")]
    for model, _ in made:
        accelerate(model, Masked())
    expected = [run(*pair) for pair in made]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            again = list(pool.map(lambda pair: run(*pair), made))
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype):
    model, inputs = zoo.build("flux")
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() and "ids" not in k else v for k, v in inputs.items()}
    accelerate(model, "grat", group=(1, 2, 2))
    out = run(model, inputs)
    assert out.dtype == dtype and bool(out.isfinite().all())


def test_state_dict_and_reload_are_plain(tmp_path):
    model, inputs = zoo.build("wan")
    plain, keys = run(model, inputs), list(model.state_dict())
    accelerate(model, Masked())
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert not any("Foveal" in type(p).__name__ for p in processors(again).values())
    torch.testing.assert_close(run(again, inputs), plain)


@pytest.mark.parametrize("first", ["fuse", "attach"])
def test_fused_projections_work_before_and_after(first):
    model, inputs = flux_transformer(), flux_inputs()
    if first == "fuse":
        model.fuse_qkv_projections()
    handle = accelerate(model, Spy())
    if first == "attach":
        model.fuse_qkv_projections()
    fused = run(model, inputs)
    handle.remove()
    assert torch.equal(run(model, inputs), fused)


def test_caches_of_diffusers_compose():
    from diffusers import FirstBlockCacheConfig

    outputs = []
    for attach in (False, True):
        model, inputs = zoo.build("wan")
        model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        if attach:
            accelerate(model, Dense())
        with model.cache_context("cond"):
            outputs.append([run(model, inputs) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_batch_of_two_is_two_batches_of_one():
    for name in REQUIRED:
        make, inputs = MODELS[name]
        model, both = make(), inputs(2)
        accelerate(model, Masked())
        whole = run(model, both)
        for i in range(2):
            ids = ("img_ids", "txt_ids")
            one = {k: v if k in ids else v[i : i + 1] for k, v in both.items()}
            torch.testing.assert_close(run(model, one), whole[i : i + 1], atol=2e-6, rtol=1e-5)


class ByHand:
    """A processor without an attention call that could be taken over."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return hidden_states


def test_unused_layers_are_named_once():
    model, inputs = zoo.build("wan")
    for block in model.blocks:
        block.attn1.set_processor(ByHand())
    handle = accelerate(model, Spy())
    with pytest.warns(UserWarning, match="2 bound layers of WanTransformer3DModel made no attention call"):
        run(model, inputs)
    run(model, inputs)
    assert str(handle.summary()).count("made no attention call") == 1


def test_wan_inputs_are_not_square():
    t, h, w = wan_inputs()["hidden_states"].shape[2:]
    assert len({t, h, w}) == 3
