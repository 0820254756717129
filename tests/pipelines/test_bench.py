"""The bench measures fairly and writes the schema: medians over interleaved rounds, failures named, every row complete."""

import json
import subprocess
import sys

import pytest
import torch

from foveal.pipelines.bench import kernels, layers
from foveal.pipelines.bench.__main__ import run
from foveal.pipelines.bench.rounds import Rounds, Timing, host_microseconds, interleaved
from foveal.pipelines.bench.rows import FIELDS, row, rows_error, write

CPU = torch.device("cpu")


def test_every_round_calls_each_competitor_once():
    called = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}
    rounds = interleaved(calls, CPU, seconds=0, least=4)
    rounds_of = [
        called[i : i + 3] for i in range(9, 21, 3)
    ]  # two warm calls and one for the cost of a round come first
    assert len(called) == 21 and all(sorted(r) == ["a", "b", "c"] for r in rounds_of)
    assert len({tuple(r) for r in rounds_of}) > 1  # nobody always follows the same call
    assert {len(t.times) for t in rounds.timings.values()} == {4}


def test_the_figure_is_the_median():
    timing = Timing((5.0, 1.0, 2.0))
    assert timing.facts() == {"ms": 2.0, "ms_min": 1.0, "ms_max": 5.0, "rounds": 3}


def test_a_competitor_that_fails_is_a_named_row_and_stops_nobody():
    def broken():
        raise RuntimeError("no kernel for this\nsecond line")

    rounds = interleaved({"fine": lambda: None, "broken": broken}, CPU, seconds=0)
    assert rounds.failed == {"broken": "RuntimeError: no kernel for this"} and list(rounds.timings) == ["fine"]
    found = row("case", "op", "broken", rounds, "fine", shape={})
    assert (
        found["ms"] is None
        and found["failed"].startswith("RuntimeError")
        and "failed: RuntimeError" in kernels.line(found)
    )


def test_eff_is_the_baselines_time_times_density_over_ours():
    rounds = Rounds({"dense": Timing((8.0,)), "ours": Timing((4.0,))})
    found = row("case", "op", "ours", rounds, "dense", density=0.25, shape={})
    assert found["speedup"] == 2.0 and found["eff"] == 0.5
    assert rounds.fastest() == "ours" and rounds.fastest(["dense"]) == "dense"


def test_errors_are_relative_to_fp64_rows():
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    everything = lambda head, r: torch.arange(12)  # noqa: E731
    assert rows_error(out, q, k, v, everything, [0, 11]) < 1e-12
    assert rows_error(out * 1.1, q, k, v, everything, [0, 11]) == pytest.approx(0.1)


def test_rows_without_a_field_of_the_schema_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lack baseline"):
        write(tmp_path / "x.json", "x", [{name: 0 for name in FIELDS if name != "baseline"}], CPU)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_random_plans_have_the_density_and_spread_asked_for(spread):
    case = kernels.Case(name="c", tokens=128 * 128, heads=4, spread=spread)
    plan = kernels.random_plan(case, 0.125, CPU)
    counts = plan.count.float()
    assert plan.density == pytest.approx(0.125, rel=0.1)
    assert float(counts.std() / counts.mean()) == pytest.approx(spread, abs=0.15)
    assert all(len(set(r[:n].tolist())) == n for r, n in zip(plan.index[0, 0], plan.count[0, 0].tolist(), strict=True))


def test_kernels_at_tiny_size_fill_the_schema(tmp_path):
    path = run("kernels", out=tmp_path / "k.json", device="cpu", seconds=0.02, tiny=True)
    record = json.loads(path.read_text())
    assert record["bench"] == "kernels" and {"torch", "foveal"} <= set(record["versions"])
    assert all(set(FIELDS) <= set(r) for r in record["rows"])
    ours = [r for r in record["rows"] if r["impl"] == "torch" and r["rel_l2"] is not None]
    assert ours and all(r["rel_l2"] < 1e-5 for r in ours)


def test_layers_at_tiny_size_state_bound_and_overhead(tmp_path):
    path = run("layers", out=tmp_path / "l.json", device="cpu", seconds=0.02, tiny=True)
    rows = json.loads(path.read_text())["rows"]
    sparse = [r for r in rows if r["method"]]
    assert {r["case"] for r in sparse} == {c.name for c in layers.TINY} and {r["method"] for r in sparse} == {
        "grat",
        "neighborhood",
    }
    dense = {r["case"]: r for r in rows if r["impl"] == "dense"}
    for r in sparse:
        block, attention = dense[r["case"]]["ms"], dense[r["case"]]["attention_ms"]
        assert r["bound"] == pytest.approx(block / (block - attention)) and 0 < r["density"] <= 0.5
        assert r["bound_at_density"] == pytest.approx(block / (block - attention + r["density"] * attention))
    assert sum("overhead" in r for r in rows) == len(layers.TINY)


def test_an_unknown_case_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no case flux-9; choose from wan-1.3b-480p"):
        list(layers.measure(CPU, 0.1, cases=["flux-9"]))


def test_full_sizes_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match="needs a GPU; give --tiny"):
        run("kernels", device="cpu")


def test_measuring_kernels_needs_torch_and_triton_only():
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'diffusers', 'omegaconf', 'typer', 'rich', 'timm'}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import foveal.pipelines.bench.kernels, foveal.pipelines.bench.__main__; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ok", done.stderr[-500:]


def test_host_time_is_counted_per_call():
    assert host_microseconds(lambda: sum(range(20000)), CPU, calls=20) > 50
