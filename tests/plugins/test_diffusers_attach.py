"""Attaching changes nothing but attention, and removing restores every bit."""

import copy

import pytest
import torch
import zoo
from fakes import Masked, Spy
from tiny import MODELS, flux_transformer, run, wan_transformer

from foveal.plugins.accelerate import AccelerateError, accelerate, handle_of
from foveal.plugins.method import MethodError

REQUIRED = sorted(MODELS)
OTHERS = sorted(zoo.OTHERS)


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
    out = run(model, inputs)
    if name == "hunyuan15":  # its processor is restated: padding is cut off instead of masked
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(out, plain)
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
        (TimmLike(), "TimmLike is left as it is|nothing to accelerate in a timm"),
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
    with pytest.raises(AccelerateError, match=r"has no knob 'rech'.*did you mean 'reach'"):
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
