"""Laws of timing one attention operator."""

import pytest
import torch

from foveal.pipelines.measure import clock, fastest_sdpa, time_operators
from foveal.plugins.method import make
from foveal.plugins.record import Capture
from foveal.plugins.site import Site, Span

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def call():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 512, 2, 32, generator=g).transpose(1, 2) for _ in range(3))
    return Capture(Site("self", "blocks.0.attn1", 0, 1, (8, 8, 8), Span(0, 512)), q, k, v)


def test_the_baseline_is_exact_attention_and_named(call):
    name, operator = fastest_sdpa(call)
    assert name.startswith("sdpa ")
    torch.testing.assert_close(operator(), torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v))


def test_efficiency_is_ratio_times_density(call):
    found = time_operators(call, {"dense": make("dense"), "grat": make("grat", group=(1, 8, 8), b=1)}, rounds=3)
    assert set(found) == {"dense", "grat"}
    assert found["dense"]["ratio"] == 1 and found["dense"]["density"] == 1
    grat = found["grat"]
    assert grat["density"] == pytest.approx(22 / 64) and grat["n"] == 3
    assert grat["efficiency"] == pytest.approx(grat["ratio"] * grat["density"])
    assert grat["ratio"] == pytest.approx(found["dense"]["median_s"] / grat["median_s"])
    assert grat["includes"] == ["order", "plan", "kernel", "inverse"] and grat["baseline"].startswith("sdpa")


def test_methods_take_turns(call):
    calls = []

    def spy(name):
        method = make("grat", group=(1, 8, 8), b=1)
        original = type(method).attend

        def attend(self, *args):
            calls.append(name)
            return original(self, *args)

        return type(f"Spy{name}", (type(method),), {"attend": attend})(group=(1, 8, 8), b=1)

    ticks = []
    time_operators(call, {"a": spy("a"), "b": spy("b")}, rounds=2, tick=lambda: ticks.append(1))
    assert calls == ["a", "b"] * len(ticks) and len(ticks) > 2


def test_the_clock_covers_the_work():
    assert clock(lambda: torch.randn(400, 400) @ torch.randn(400, 400), torch.device("cpu")) > 0


def test_other_programs_are_seen_and_we_are_not(tmp_path):
    import subprocess
    import sys
    import time

    from foveal.pipelines.load import busy_seconds, others_watched

    if busy_seconds() is None:
        pytest.skip("the kernel does not tell")
    with others_watched() as quiet:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with others_watched() as watched:
            time.sleep(1.0)
    finally:
        other.kill()
        other.wait()
    assert quiet.share is not None and 0 <= quiet.share <= 1
    assert watched.share is not None and watched.share > 0.02


def test_a_busy_machine_is_said_to_be_busy():
    from foveal.pipelines.summary import unsteady_sentence

    assert unsteady_sentence({"design": {"step_spread": 0.02, "others_cpu": 0.01}}) == ""
    assert unsteady_sentence({"design": {"step_spread": None, "others_cpu": None}}) == ""
    assert "40" in unsteady_sentence({"design": {"step_spread": 0.02, "others_cpu": 0.4}})
    assert "30" in unsteady_sentence({"design": {"step_spread": 0.3, "others_cpu": None}})
