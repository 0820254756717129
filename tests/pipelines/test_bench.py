"""The bench measures fairly and writes the schema: medians over interleaved rounds, failures named, every row complete."""

import json
import subprocess
import sys

import pytest
import torch

from foveal.pipelines.bench import kernels
from foveal.pipelines.bench.__main__ import run
from foveal.pipelines.bench.rounds import Rounds, Timing, host_microseconds, how_many, interleaved
from foveal.pipelines.bench.rows import FIELDS, row, rows_error, write

CPU = torch.device("cpu")


# ---- rounds
def test_every_round_calls_each_competitor_once():
    called = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}
    rounds = interleaved(calls, CPU, seconds=0, least=4)
    timed = [called[i : i + 3] for i in range(9, 21, 3)]  # two warm calls and one for the cost of a round come first
    assert len(called) == 21 and all(sorted(r) == ["a", "b", "c"] for r in timed)
    assert len({tuple(r) for r in timed}) > 1  # nobody always follows the same call
    assert {len(t.times) for t in rounds.timings.values()} == {4}


@pytest.mark.parametrize(
    ("cost_ms", "seconds", "rounds", "expected"),
    [(100, 2.0, None, 20), (10_000, 2.0, None, 5), (0.01, 2.0, None, 40), (100, 2.0, 3, 3)],
    ids=["fills-the-time", "at-least-five", "at-most-forty", "as-told"],
)
def test_rounds_follow_the_time_unless_they_are_given(cost_ms, seconds, rounds, expected):
    assert how_many(cost_ms, seconds, rounds) == expected


def test_the_figure_is_the_median():
    timing = Timing((5.0, 1.0, 2.0))
    assert timing.facts() == {"ms": 2.0, "ms_min": 1.0, "ms_max": 5.0, "rounds": 3}


def test_drift_cancels_in_a_ratio_taken_round_by_round():
    base = (1.0, 8.0, 2.0, 4.0, 16.0)
    rounds = Rounds({"base": Timing(base), "ours": Timing(tuple(1.25 * t for t in base))})
    assert rounds.ratio("ours", "base") == pytest.approx((1.25, 1.25, 1.25))


def broken(after=0):
    left = [after]

    def call():
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no kernel for this\nsecond line")

    return call


@pytest.mark.parametrize("after", [0, 5], ids=["at-once", "in-the-middle-of-the-rounds"])
def test_a_competitor_that_fails_is_a_named_row_and_stops_nobody(after):
    rounds = interleaved({"fine": lambda: None, "broken": broken(after)}, CPU, rounds=6)
    assert rounds.failed == {"broken": "RuntimeError: no kernel for this"}
    assert list(rounds.timings) == ["fine"] and len(rounds.timings["fine"].times) == 6
    found = row("case", "op", "broken", rounds, "fine", shape={})
    assert found["ms"] is None and found["speedup"] is None and set(FIELDS) <= set(found)
    assert "failed: RuntimeError: no kernel for this" in kernels.line(found)


def test_a_competitor_that_failed_is_not_called_again():
    tries = []

    def fails_in_its_second_round():
        tries.append(0)
        if len(tries) > 4:
            raise RuntimeError

    interleaved({"fine": lambda: None, "broken": fails_in_its_second_round}, CPU, rounds=9)
    assert len(tries) == 5


# ---- rows
def test_eff_is_the_baselines_time_times_density_over_ours():
    rounds = Rounds({"dense": Timing((8.0,)), "ours": Timing((4.0,))})
    found = row("case", "op", "ours", rounds, "dense", density=0.25, shape={})
    assert found["speedup"] == 2.0 and found["eff"] == 0.5
    assert rounds.fastest() == "ours" and rounds.fastest(["dense"]) == "dense"


def test_without_a_baseline_there_is_no_speed_up():
    rounds = Rounds({"ours": Timing((4.0,))}, {"dense": "RuntimeError: out of memory"})
    assert rounds.fastest(["dense"]) is None
    found = row("case", "op", "ours", rounds, None, shape={})
    assert found["ms"] == 4.0 and found["speedup"] is None and found["eff"] is None
    assert "4.000 ms" in kernels.line(found)


def test_errors_are_relative_to_fp64_rows():
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    everything = lambda head, r: torch.arange(12)  # noqa: E731
    assert rows_error(out, q, k, v, everything, [0, 11]) < 1e-12
    assert rows_error(out * 1.1, q, k, v, everything, [0, 11]) == pytest.approx(0.1)


def test_rows_without_a_field_of_the_schema_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lack baseline"):
        write(tmp_path / "x.json", "x", [{name: 0 for name in FIELDS if name != "baseline"}], CPU)


def test_host_time_is_counted_per_call():
    assert host_microseconds(lambda: sum(range(20000)), CPU, calls=20) > 50


# ---- the entry points
@pytest.mark.parametrize("what", ["kernels", "layers"])
def test_full_sizes_are_refused_on_a_cpu(what):
    with pytest.raises(ValueError, match="needs a GPU; give --tiny"):
        run(what, device="cpu")


def test_a_run_that_is_cut_off_leaves_what_it_has(tmp_path, monkeypatch):
    def measured(*_):
        yield [row("first", "op", "ours", Rounds({"ours": Timing((1.0,))}), "ours", shape={})]
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        run("kernels", out=tmp_path / "k.json", device="cpu", tiny=True)
    assert [r["case"] for r in json.loads((tmp_path / "k.json").read_text())["rows"]] == ["first"]


def test_measuring_needs_torch_and_triton_only(tmp_path):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'diffusers', 'omegaconf', 'typer', 'rich', 'timm', 'transformers'}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import foveal.pipelines.bench.layers\n"
        "from foveal.pipelines.bench.__main__ import main\n"
        f"sys.argv = ['bench', 'kernels', '--tiny', '--device', 'cpu', '--rounds', '1', '--cases', 'sparse', 'window', '--out', {str(tmp_path / 'k.json')!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert not [r for r in json.loads((tmp_path / "k.json").read_text())["rows"] if r.get("failed")]
