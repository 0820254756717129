"""torch.compile: one graph per block class, the method and the record as without a compiler."""

import pytest
import torch
from fakes import Masked
from tiny import MODELS, flux_inputs, flux_transformer, noise, run, wan_inputs, wan_pipe, wan_transformer
from torch._dynamo.testing import CompileCounterWithBackend

from foveal.plugins.accelerate import AccelerateError, accelerate

pytestmark = pytest.mark.usefixtures("fresh_compiler")
GRAT_KNOBS = {"group": (1, 2, 2), "b": (1, 1, 0)}


# Graphs the plain tiny models compile to: one per block class, and one more where the first single block gets other strides.
# HunyuanVideo compiles its patch embedding as a block, so the permutation behind it is one small graph more.
GRAPHS = {"wan": 1, "flux": 3, "hunyuan": 5 + 1}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_regional_compilation_makes_as_many_graphs_as_the_plain_model(name):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs(2)
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    eager = run(model, inputs)
    handle.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(run(model, inputs), eager, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == GRAPHS[name]
    assert handle.record.density() < 1 and all(row.calls == 1 for row in handle.record.layers)


def test_steps_and_branches_do_not_compile_again():
    pipe = wan_pipe()
    handle = accelerate(pipe, Masked(dense_steps=1, dense_layers=(1,)))
    counter = CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        for branch in ("cond", "uncond"):
            with pipe.transformer.cache_context(branch):
                out = run(pipe.transformer, wan_inputs())
        pipe.scheduler.step(out, t, out)
    assert counter.frame_count == 1
    assert handle.record.ran_dense_why()[0]["reason"] in ("dense step", "dense layer")
    assert [(row.calls, row.dense_calls) for row in handle.record.layers] == [(6, 2), (6, 6)]


def test_function_mode_layers_trace_too():
    import zoo

    for name in ("cogvideox", "sd3"):
        torch.compiler.reset()
        model, inputs = zoo.build(name)
        accelerate(model, Masked())
        eager = run(model, inputs)
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(run(model, inputs), eager, atol=1e-6, rtol=1e-5)


def test_compile_first_then_accelerate_is_one_graph():
    model, inputs = wan_transformer(), wan_inputs()
    with accelerate(model, "grat", **GRAT_KNOBS):
        eager = run(model, inputs)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with accelerate(compiled, "grat", **GRAT_KNOBS) as handle:
        for _ in range(3):
            torch.testing.assert_close(run(compiled, inputs), eager, atol=1e-6, rtol=1e-5)
        assert [row.calls for row in handle.record.layers] == [3, 3]
        assert handle.record.layers[0].facts.plan.ordered
    assert counter.frame_count == 1


def test_a_whole_graph_of_attention_that_reads_signatures():
    """Flux asks every processor for the names of its arguments, in the graph."""
    model, inputs = flux_transformer(num_layers=1, num_single_layers=1), flux_inputs()
    with accelerate(model, "grat", **GRAT_KNOBS):
        eager = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with accelerate(compiled, "grat", **GRAT_KNOBS) as handle:
        torch.testing.assert_close(run(compiled, inputs), eager, atol=1e-6, rtol=1e-5)
        assert handle.record.density() < 1


def test_accelerate_first_then_whole_graph_says_what_to_do():
    model, inputs = wan_transformer(), wan_inputs()
    accelerate(model, "grat", **GRAT_KNOBS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"compile it first, then call foveal\.accelerate"):
        run(compiled, inputs)
    assert issubclass(AccelerateError, ValueError)


def test_gradients_pass_through_compiled_blocks():
    model, inputs = wan_transformer(), wan_inputs()
    handle = accelerate(model, "grat", **GRAT_KNOBS)
    grads = []
    for compiled in (False, True):
        if compiled:
            handle.reset()
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        model.zero_grad()
        (model(**inputs, return_dict=False)[0] * noise(1, 16, 3, 8, 12, seed=9)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert [row.calls for row in handle.record.layers] == [1, 1]
