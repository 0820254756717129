"""`bench kernels`: every competitor of every case is a row with a true error, one baseline per case, and plans as asked for."""

import json

import pytest
import torch

from foveal.pipelines.bench import cases, competitors, kernels, sparse
from foveal.pipelines.bench.__main__ import run
from foveal.pipelines.bench.rounds import How, Rounds, Timing
from foveal.pipelines.bench.rows import FIELDS
from foveal.plugins.order import order_of

CPU = torch.device("cpu")
FEW = How.on(CPU, rounds=2)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = run("kernels", out=tmp_path_factory.mktemp("bench") / "k.json", device="cpu", rounds=2, tiny=True)
    return json.loads(path.read_text())


def test_the_record_has_the_schema(record):
    assert record["bench"] == "kernels" and {"torch", "foveal"} <= set(record["versions"]) and record["rounds"] == 2
    assert all(set(FIELDS) <= set(r) for r in record["rows"]) and not [r for r in record["rows"] if r.get("failed")]
    assert {r["dtype"] for r in record["rows"]} == {"fp32"}


def test_every_attention_row_has_a_true_error(record):
    timed = [r for r in record["rows"] if r["op"] in ("dense_fwd", "block_sparse_fwd", "gated_linear_fwd")]
    known = [r for r in timed if r["case"].startswith("tiny") and not r["impl"].endswith("-padded")]
    known = [r for r in known if "gate" not in r or r["op"] == "gated_linear_fwd"]
    assert {"torch", "flash2", "math"} <= {r["impl"] for r in known}
    assert all(r["rel_l2"] is not None and r["rel_l2"] < 1e-5 for r in known)


def test_the_baseline_of_a_case_is_its_fastest_sdpa_padded_or_not(record):
    for case in cases.TINY_SPARSE:
        rows = [r for r in record["rows"] if r["case"].startswith(case.name) and r["case"].split(" @")[0] == case.name]
        dense = {r["impl"]: r["ms"] for r in rows if r["op"] == "dense_fwd"}
        assert {r["baseline"] for r in rows} == {min(dense, key=dense.get)}
        for r in rows:
            assert r["eff"] == pytest.approx(dense[r["baseline"]] * r["density"] / r["ms"])
    ragged = {r["impl"] for r in record["rows"] if r["case"] == "tiny ragged"}
    assert ragged == {"flash2", "flash2-padded", "math", "math-padded"}


@pytest.mark.parametrize("name", ["flash2-padded", "cudnn-padded", "efficient"])
def test_any_backend_of_sdpa_can_be_the_baseline_and_no_other_package(name):
    times = {"cudnn": 9.0, "flash4": 1.0, "xformers": 2.0, "hopper in c @ 0.5": 0.5, name: 4.0}
    assert sparse.baseline_of(Rounds({n: Timing((ms,)) for n, ms in times.items()})) == name


def test_padded_rows_leave_out_their_mask_and_claim_no_error(record):
    padded = [r for r in record["rows"] if r["impl"].endswith("-padded")]
    assert padded and all(r["rel_l2"] is None and r["ms"] > 0 for r in padded)


def test_unequal_counts_stand_beside_equal_ones(record):
    rows = {r["case"]: r for r in record["rows"] if r["case"].startswith("tiny ragged @") and r["impl"] == "torch"}
    uneven, even = rows["tiny ragged @ 0.25"], rows["tiny ragged @ 0.25, equal counts"]
    per_pair = even["ms"] / even["density"] / (uneven["ms"] / uneven["density"])
    assert uneven["against_equal"] == pytest.approx(per_pair) and "against_equal" not in even


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_random_plans_have_the_density_and_spread_asked_for(spread):
    case = cases.Case(name="c", tokens=128 * 128, heads=4, spread=spread)
    plan = sparse.random_plan(case, 0.125, CPU)
    counts = plan.count.float()
    assert plan.density == pytest.approx(0.125, rel=0.1)
    assert float(counts.std() / counts.mean()) == pytest.approx(spread, abs=0.15)
    assert all(len(set(r[:n].tolist())) == n for r, n in zip(plan.index[0, 0], plan.count[0, 0].tolist(), strict=True))


def test_the_window_of_the_errors_is_the_definition():
    case = cases.TINY_WINDOWS[0]
    coord = order_of(case.grid, case.tile).coord.int()
    seen = sparse.window_keys(case, coord)
    for at in range(coord.shape[1]):
        keys = coord[:, seen(0, at)]
        width = keys.amax(1) - keys.amin(1) + 1
        assert width.tolist() == list(case.window) and keys.shape[1] == width.prod()
        assert (keys.amin(1) <= coord[:, at]).all() and (coord[:, at] <= keys.amax(1)).all()


# ---- failures
def test_a_peer_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    def with_broken(*args):
        return {"broken": lambda: 1 / 0, **competitors.ours(*args[:4])}

    monkeypatch.setattr(competitors, "sparse", with_broken)
    rows = {r["impl"]: r for r in sparse.sparse_rows(cases.TINY_SPARSE[2], FEW)}
    assert rows["broken"]["failed"] == "ZeroDivisionError: division by zero" and rows["broken"]["ms"] is None
    assert rows["torch"]["ms"] > 0 and rows["torch"]["rel_l2"] < 1e-5


def test_a_case_that_cannot_be_set_up_is_a_row(monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sparse, "draw", out_of_memory)
    (rows,) = kernels.measure(CPU, 0.1, tiny=True, cases=["tiny"], rounds=1)
    assert [(r["case"], r["failed"]) for r in rows] == [("tiny", "RuntimeError: out of memory")]
    assert set(FIELDS) <= set(rows[0])


# ---- the choice of cases
def test_cases_are_chosen_by_group_and_by_name():
    assert {job.group for job in kernels.chosen(False, ["linear", "window"])} == {"linear", "window"}
    assert [job.name for job in kernels.chosen(False, ["wan-14b ragged"])] == ["wan-14b ragged"]
    assert {job.group for job in kernels.chosen(False, None)} == {job.group for job in kernels.chosen(True, None)}


def test_an_unknown_case_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no case 'sparce'; choose from host, order, sparse, .*wan-1.3b ragged"):
        list(kernels.measure(CPU, 0.1, cases=["sparce"]))


def test_names_of_cases_are_unique():
    for tiny in (False, True):
        names = [job.name for job in kernels.jobs(tiny)]
        assert len(names) == len(set(names))
