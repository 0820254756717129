"""Queries and keys finished in one kernel: the same numbers, only where the method runs, only for norms that are known."""

from functools import partial

import pytest
import torch
from fakes import Masked, Spy
from tiny import MODELS, run, wan_inputs, wan_pipe
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from foveal.kernels import query_key
from foveal.plugins.accelerate import accelerate
from foveal.plugins.diffusers_host import fused
from foveal.plugins.diffusers_host.private import rms_norm

GRAT_KNOBS = {"group": (1, 2, 2), "b": (1, 1, 0)}
NAMES = sorted(MODELS)


@pytest.fixture
def counted(monkeypatch):
    """The fused way on the CPU, with PyTorch in the kernel's place. -> how many calls it got"""
    calls = []

    def finish(*args, **kwargs):
        calls.append(kwargs.get("order") is not None)
        return query_key.norm_and_rotate(*args, **kwargs)

    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused, "refusal", partial(query_key.refusal, by_name=True))
    monkeypatch.setattr(fused, "norm_and_rotate", finish)
    return calls


def build(name, dtype=torch.float32, batch=1):
    """A tiny model as a pipeline in that dtype holds it, with norm weights that are not one, and its inputs."""
    make, inputs = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.RMSNorm, rms_norm())):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    kept = set(model._keep_in_fp32_modules or ())
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not kept & set(key.split(".")):
            tensor.data = tensor.data.to(dtype)
    exact = ("timestep", "img_ids", "txt_ids", "guidance", "encoder_attention_mask")
    return model.requires_grad_(False), {k: x if k in exact else x.to(dtype) for k, x in inputs(batch).items()}


@torch.no_grad()
def outputs(model, inputs):
    return run(model, inputs)


@pytest.mark.parametrize("hook", [True, False], ids=["tokens in order", "order on the way"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_fused_way_equals_the_models_own_operations(name, dtype, hook, counted):
    model, inputs = build(name, dtype, batch=2)
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    handle.order_hook, handle.fused = hook, False
    own = outputs(model, inputs)
    assert not counted and handle.fused is False
    handle.fused = True
    assert torch.equal(outputs(model, inputs), own)
    assert len(counted) >= len(handle.record.layers) and any(counted) is not hook
    assert [(row.calls, row.dense_calls) for row in handle.record.layers] == [(2, 0)] * len(handle.record.layers)
    assert f"{fused.ON}." in str(handle.summary())


HANDED_BACK = {
    "no plan": (NAMES, Spy, {}),
    "a plan of all pairs": (
        ("flux", "wan"),
        "neighborhood",
        {"window": -1, "tile": (1, 2, 2)},
    ),  # HunyuanVideo's has padding
}


@pytest.mark.parametrize(("name", "kind"), [(n, kind) for kind, (names, *_) in HANDED_BACK.items() for n in names])
def test_what_the_method_hands_back_keeps_the_models_own_bits(name, kind, counted):
    model, inputs = build(name)
    dense = outputs(model, inputs)
    _, method, knobs = HANDED_BACK[kind]
    handle = accelerate(model, method, **knobs)
    handle.order_hook = False  # another order of the tokens is another order of sums
    assert torch.equal(outputs(model, inputs), dense)
    first = len(counted)
    assert first > 0 and torch.equal(outputs(model, inputs), dense)
    assert len(counted) == first  # once handed back, such calls are not tried again in this run
    assert [(row.calls, row.dense_calls) for row in handle.record.layers] == [(2, 2)] * len(handle.record.layers)
    handle.reset()
    outputs(model, inputs)
    assert len(counted) == 2 * first


def test_a_method_is_asked_once_per_call_that_it_hands_back(counted):
    model, inputs = build("flux")
    spy = Spy()
    accelerate(model, spy)
    outputs(model, inputs)
    assert len(spy.seen) == 4 and len(counted) > 0


def test_dense_steps_and_layers_never_reach_the_kernel(counted):
    pipe = wan_pipe()
    accelerate(pipe, Masked(dense_steps=1, dense_layers=(1,)))
    pipe.scheduler.set_timesteps(3)
    used = []
    for t in pipe.scheduler.timesteps:
        out = outputs(pipe.transformer, wan_inputs())
        used.append(len(counted))
        pipe.scheduler.step(out, t, out)
    assert used == [0, 1, 2]  # one of two layers, from the second step on


class Odd(nn.RMSNorm):
    pass


def hooked(norm):
    norm.register_forward_hook(lambda *_: None)
    return norm


def replaced_forward(norm):
    norm.forward = norm.forward
    return norm


def wider(norm):
    norm.weight.data = norm.weight.data.double()
    return norm


STRANGE = {
    "a subclass": (lambda n: Odd(n.normalized_shape, n.eps), "Odd is no RMS norm that foveal knows"),
    "another kind": (lambda n: nn.LayerNorm(n.normalized_shape), "LayerNorm is no RMS norm that foveal knows"),
    "a hook": (hooked, "there are hooks on RMSNorm"),
    "an offloaded module": (replaced_forward, "there are hooks on RMSNorm"),
    "no eps": (
        lambda n: nn.RMSNorm(n.normalized_shape),
        "RMSNorm has another width than its queries, a bias, or no eps",
    ),
    "a weight in another dtype": (wider, "the norm's weight is torch.float64 on cpu"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_norms_that_are_not_known_stay_the_models(kind, counted):
    change, reason = STRANGE[kind]
    model, inputs = build("wan")
    for block in model.blocks:
        block.attn1.norm_k = change(block.attn1.norm_k)
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    projected = []
    model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: projected.append(1))
    for _ in range(3):
        outputs(model, inputs)
    assert not counted and all(row.dense_calls == 0 for row in handle.record.layers)
    assert f"{fused.OFF}: {reason}" in str(handle.summary())
    assert len(projected) == 4  # twice in the first call, to find out


def test_gradients_keep_the_models_own_operations(counted):
    model, inputs = build("wan")
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    run_with_gradients = model(**inputs, return_dict=False)[0]
    assert not counted and f"{fused.OFF}: gradients are on." in handle.record.notes
    torch.testing.assert_close(outputs(model, inputs), run_with_gradients, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_projections_are_called_as_modules(name, counted):
    """What sits in or on a projection (LoRA, quantised weights, hooks) has its effect."""
    model, inputs = build(name)
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    attention = model.get_submodule(handle.still_bound()[0])
    attention.to_q.register_forward_hook(lambda module, args, out: 2 * out + args[0].sum())
    fused_out = outputs(model, inputs)
    handle.fused = False
    assert len(counted) > 0 and torch.equal(fused_out, outputs(model, inputs))


def test_fused_projections_are_read_where_they_lie(counted):
    model, inputs = build("flux")
    model.fuse_qkv_projections()
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    out = outputs(model, inputs)
    handle.fused = False
    assert len(counted) > 0 and torch.equal(out, outputs(model, inputs))


def test_a_failed_call_leaves_nothing_behind(counted):
    model, inputs = build("flux")
    handle = accelerate(model, Spy())
    broken = model.transformer_blocks[0].attn.norm_q.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs(model, inputs)
    broken.remove()
    assert all(bound.layer.handed_back is None for a in handle.attachments for bound in a.bound.values())


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_leave_it_to_the_compiler(counted):
    model, inputs = build("flux")
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    eager = outputs(model, inputs)
    tried = len(counted)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for _ in range(3):  # steps do not compile again
        torch.testing.assert_close(outputs(model, inputs), eager, atol=1e-6, rtol=1e-5)
    assert len(counted) == tried and counter.frame_count == 3 and handle.record.density() < 1


def test_nothing_is_said_where_there_is_no_such_device():
    model, inputs = build("flux")
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    outputs(model, inputs)
    assert not [note for note in handle.record.notes if "norm" in note]


@pytest.mark.parametrize("twice", [False, True], ids=["PyTorch's RMSNorm", "diffusers' RMSNorm"])
def test_a_norm_module_is_read_as_what_it_computes(twice):
    torch.manual_seed(0)
    module = (rms_norm()(16, 1e-5) if twice else nn.RMSNorm(16, eps=1e-5)).half()
    nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(2, 7, 3, 16).half()
    norm = fused.norm_of(module, 16, across=False)
    made, _ = query_key.norm_and_rotate(x, x, (norm, norm), implementation="torch")
    assert norm.twice is twice and torch.equal(made, module(x))
