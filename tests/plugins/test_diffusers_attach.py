"""Attaching changes nothing but attention, and removing restores every bit."""

import copy
import importlib.util

import pytest
import torch
import zoo
from fakes import Masked, Spy
from tiny import MODELS, flux_inputs, flux_transformer, run, wan_inputs, wan_transformer

from foveal.plugins.accelerate import AccelerateError, accelerate, handle_of
from foveal.plugins.method import MethodError
from foveal.plugins.methods.dense import Dense

REQUIRED = sorted(MODELS)
OTHERS = [
    pytest.param(
        n, marks=pytest.mark.skipif(n == "cosmos" and not importlib.util.find_spec("torchvision"), reason="torchvision")
    )
    for n in sorted(zoo.OTHERS)
]


def processors(model):
    return {name: m.processor for name, m in model.named_modules() if getattr(m, "processor", None) is not None}


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [len(getattr(m, n)) for m in model.modules() for n in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*REQUIRED, *OTHERS])
def test_dense_is_bit_identical_and_remove_restores_everything(name):
    model, inputs = zoo.build(name)
    plain, before, attributes, hooked = run(model, inputs), processors(model), set(model.__dict__), hooks(model)
    handle = accelerate(model, Spy())
    assert torch.equal(run(model, inputs), plain)
    handle.remove()
    assert all(processors(model)[n] is p for n, p in before.items())
    assert set(model.__dict__) == attributes
    assert hooks(model) == hooked
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", REQUIRED)
def test_cross_and_text_attention_are_never_touched(name):
    model, _ = zoo.build(name)
    before = processors(model)
    with accelerate(model, Spy()) as handle:
        touched = {n for n, p in processors(model).items() if p is not before[n]}
        assert touched == set(handle.still_bound())
    assert not any("attn2" in n or "refiner" in n for n in touched)
    assert touched


def test_second_accelerate_replaces_the_first_and_keeps_its_originals():
    model, inputs = zoo.build("wan")
    plain, before = run(model, inputs), processors(model)
    first = accelerate(model, Masked(reach=0))
    second = accelerate(model, Spy())
    assert not first.is_active() and second.is_active()
    assert handle_of(model) is second
    assert torch.equal(run(model, inputs), plain)
    first.remove()
    assert second.is_active()
    second.remove()
    assert processors(model) == before and handle_of(model) is None


def test_context_manager_removes_itself_on_errors():
    model, _ = zoo.build("wan")
    before = processors(model)
    with pytest.raises(RuntimeError), accelerate(model, Spy()):
        raise RuntimeError
    assert processors(model) == before


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ([0, -1], [0, 3]),
        ("single_*", [2, 3]),
        (["transformer_blocks.1.attn"], [1]),
        (lambda name: name.endswith("0.attn"), [0, 2]),
    ],
)
def test_layers_choose(layers, expected):
    model = flux_transformer()
    names = list(accelerate(model, Spy()).still_bound())
    handle = accelerate(model, Spy(), layers=layers)
    assert handle.still_bound() == [names[i] for i in expected]


def test_roles_reach_cross_attention_only_when_asked():
    model = wan_transformer()
    assert accelerate(model, Spy(), roles=["cross"]).still_bound() == ["blocks.0.attn2", "blocks.1.attn2"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": "nothing*"}, "selects none of the 2 attention layers"),
        ({"layers": [5]}, "outside 0 to 1"),
        ({"roles": ["audio"]}, "no attention layers of the roles audio; it has: cross, self"),
    ],
)
def test_impossible_choices_are_refused_and_leave_the_model_alone(kwargs, message):
    model = wan_transformer()
    attributes, before = set(model.__dict__), processors(model)
    with pytest.raises(AccelerateError, match=message):
        accelerate(model, Spy(), **kwargs)
    assert processors(model) == before and set(model.__dict__) == attributes


class TimmLike(torch.nn.Module):
    pass


TimmLike.__module__ = "timm.models.vision_transformer"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.nn.Linear(2, 2), "nothing to accelerate in a torch.nn.modules.linear.Linear; give a diffusers pipeline"),
        ("wan", "nothing to accelerate in a builtins.str"),
        (TimmLike(), "timm models are not supported yet"),
    ],
)
def test_other_targets_are_refused_in_one_sentence(target, message):
    with pytest.raises(AccelerateError, match=message):
        accelerate(target, "dense")


def test_unknown_methods_and_knobs_name_the_nearest():
    model = wan_transformer()
    with pytest.raises(MethodError, match="did you mean 'grat'"):
        accelerate(model, "gratt")
    with pytest.raises(MethodError, match="did you mean 'group'"):
        accelerate(model, "grat", groop=(1, 2, 3))
    with pytest.raises(AccelerateError, match="has no knob 'rech'.*did you mean 'reach'"):
        accelerate(model, Masked, rech=2)
    with pytest.raises(AccelerateError, match="is no method"):
        accelerate(model, 3)


def test_method_instances_take_knobs():
    model = wan_transformer()
    assert accelerate(model, Masked(reach=2), min_tokens=5).method == Masked(reach=2, min_tokens=5)
    assert accelerate(model, Masked, reach=3).method == Masked(reach=3)


def test_replaced_processors_are_noticed_and_left_alone_by_remove():
    model, inputs = zoo.build("wan")
    handle = accelerate(model, Spy())
    other = copy.copy(model.blocks[0].attn2.processor)
    model.blocks[0].attn1.set_processor(other)
    with pytest.warns(UserWarning, match="1 of 2 layers hold another processor now"):
        assert not handle.is_active()
    run(model, inputs)
    assert "hold another processor" in str(handle.summary())
    handle.remove()
    assert model.blocks[0].attn1.processor is other


def test_processors_with_weights_are_left_alone_by_name():
    class Weighted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, torch.nn.Parameter(torch.zeros(1))

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    model, inputs = zoo.build("wan")
    own = Weighted(model.blocks[0].attn1.processor)
    model.blocks[0].attn1.set_processor(own)
    plain, keys = run(model, inputs), set(model.state_dict())
    with accelerate(model, Spy()) as handle:
        assert torch.equal(run(model, inputs), plain)
        assert set(model.state_dict()) == keys
        assert "weights of its own" in str(handle.summary())
        assert handle.still_bound() == ["blocks.1.attn1"]
    assert model.blocks[0].attn1.processor is own


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


def test_unused_layers_are_named_once():
    model, inputs = zoo.build("sana")
    handle = accelerate(model, Spy())
    with pytest.warns(UserWarning, match="2 bound layers of SanaTransformer2DModel made no attention call"):
        run(model, inputs)
    run(model, inputs)
    assert str(handle.summary()).count("made no attention call") == 1


def test_wan_inputs_are_not_square():
    t, h, w = wan_inputs()["hidden_states"].shape[2:]
    assert len({t, h, w}) == 3
