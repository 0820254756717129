"""Gradients: checkpointing recomputes without a trace, LoRA fits before and after, sparse attention trains."""

import pytest
import torch
from fakes import Masked, Spy
from tiny import MODELS, run, wan_inputs, wan_transformer

from foveal.plugins.accelerate import accelerate


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_checkpointed_gradients_are_the_plain_ones(name):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    plain = gradients(model, inputs)
    accelerate(model, Spy(shuffle=True))
    model.enable_gradient_checkpointing()
    model.train()
    for parameter, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, plain[parameter], atol=1e-5, rtol=1e-4)


def test_recomputation_changes_neither_state_nor_record():
    model, inputs = wan_transformer(), wan_inputs()
    model.enable_gradient_checkpointing()
    model.train()
    spy = Spy()
    handle = accelerate(model, spy)
    gradients(model, inputs)
    assert len(spy.seen) == 4, "two layers, each computed and recomputed"
    assert [row.calls for row in handle.record.layers] == [1, 1]
    states = [b.layer.states[None] for b in model.__dict__["_foveal"].bound.values()]
    assert [state["calls"] for state in states] == [1, 1]


def test_sparse_gradients_with_and_without_checkpointing_agree():
    model, inputs = wan_transformer(), wan_inputs(2)
    accelerate(model, "grat", group=(1, 2, 3))
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    model.train()
    for parameter, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, plain[parameter], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("first", ["lora", "attach"])
def test_lora_fits_before_and_after(first):
    peft = pytest.importorskip("peft")
    outputs = []
    for attach in (False, True):
        model, inputs = wan_transformer(), wan_inputs()
        if attach and first == "attach":
            accelerate(model, Masked(reach=99))
        torch.manual_seed(1)
        model.add_adapter(
            peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        if attach and first == "lora":
            accelerate(model, Masked(reach=99))
        outputs.append(run(model, inputs))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
