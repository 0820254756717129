"""Steps, guidance branches, and what starts a run."""

import pytest
from fakes import Masked, Spy
from tiny import PIPES, noise, run, wan_call, wan_inputs, wan_pipe, wan_transformer

from foveal.plugins.accelerate import accelerate


def reasons(handle):
    return {item["reason"]: item["count"] for item in handle.record.ran_dense_why()}


def test_pipeline_steps_and_branches():
    pipe, spy = wan_pipe(), Spy()
    accelerate(pipe, spy)
    wan_call(pipe, steps=3)
    first_layer = [(s.step, s.steps, s.branch) for s, _ in spy.seen if s.layer == 0]
    assert first_layer == [(step, 3, branch) for step in range(3) for branch in ("cond", "uncond")]
    wan_call(pipe, steps=2)
    assert [(s.step, s.steps) for s, _ in spy.seen if s.layer == 0][6:] == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("name", ["flux", "hunyuan"])
def test_distilled_pipelines_have_one_branch(name):
    make, call = PIPES[name]
    pipe, spy = make(), Spy()
    accelerate(pipe, spy)
    call(pipe, steps=3)
    assert [(s.step, s.steps, s.branch) for s, _ in spy.seen if s.layer == 0] == [(i, 3, "cond") for i in range(3)]


def test_two_passes_without_a_context_are_told_apart():
    pipe, spy = wan_pipe(), Spy()
    accelerate(pipe, spy)
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        for seed in (1, 2):
            out = run(pipe.transformer, {**wan_inputs(), "encoder_hidden_states": noise(1, 12, 32, seed=seed)})
        pipe.scheduler.step(out, t, out)
    assert [(s.step, s.branch) for s, _ in spy.seen if s.layer == 0] == [
        (0, None),
        (0, "pass1"),
        (1, None),
        (1, "pass1"),
    ]


def test_model_alone_counts_calls_per_branch_until_reset():
    model, inputs, spy = wan_transformer(), wan_inputs(), Spy()
    handle = accelerate(model, spy)
    for _ in range(2):
        for branch in ("cond", "uncond"):
            with model.cache_context(branch):
                run(model, inputs)
    handle.reset()
    with model.cache_context("cond"):
        run(model, inputs)
    steps = [(s.step, s.branch) for s, _ in spy.seen if s.layer == 0]
    assert steps == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"), (0, "cond")]


def test_context_step_index_wins():
    model, inputs, spy = wan_transformer(), wan_inputs(), Spy()
    accelerate(model, spy)
    with model.cache_context("cond", step_index=7, num_inference_steps=9):
        run(model, inputs)
    assert [(s.step, s.steps) for s, _ in spy.seen] == [(7, 9)] * 2


def test_state_is_per_branch_and_starts_anew_with_every_run():
    pipe, spy = wan_pipe(), Spy()
    handle = accelerate(pipe, spy)
    wan_call(pipe, steps=3)
    layer = pipe.transformer.blocks[0].attn1.processor.layer
    assert layer.states == {}, "the pipeline resets stateful hooks when it ends"
    pipe.scheduler.set_timesteps(2)
    for branch in ("cond", "uncond", "cond"):
        with pipe.transformer.cache_context(branch):
            run(pipe.transformer, wan_inputs())
    assert {k: s["calls"] for k, s in layer.states.items()} == {"cond": 2, "uncond": 1}
    assert handle.state["transformer.blocks.0.attn1", "cond"] is layer.states["cond"]
    pipe.scheduler.set_timesteps(2)
    assert layer.states == {} and handle.state_bytes() == 0


def test_dense_steps_and_layers_stand_aside_by_name():
    pipe = wan_pipe()
    handle = accelerate(pipe, Masked(dense_steps=0.5, dense_layers=(-1,)))
    wan_call(pipe, steps=4)
    assert reasons(handle) == {"dense step": 8, "dense layer": 4}
    rows = handle.record.table()
    assert [(row["calls"], row["dense_calls"]) for row in rows] == [(8, 4), (8, 8)]


def test_fraction_of_unknown_steps_is_said():
    model = wan_transformer()
    handle = accelerate(model, Masked(dense_steps=0.5))
    run(model, wan_inputs())
    assert "number of steps is unknown" in str(handle.summary())
