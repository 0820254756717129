"""Pages are drawn from measured files and are current; `foveal bench` and `foveal methods --presets` do what they say."""

import json
import sys
from pathlib import Path

import pytest

from foveal import cli
from foveal.pipelines.bench.rounds import Rounds, Timing
from foveal.pipelines.bench.rows import row
from foveal.pipelines.presets import names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_page
import preset_page
import tables

SIZE = {"tokens": 4096, "heads": 24, "head_dim": 128, "batch": 1}


# ---- pages
@pytest.mark.parametrize("page", [name for name in tables.PAGES if name != "README.md"])
def test_pages_are_drawn_from_the_data(page):
    assert (tables.ROOT / page).read_text() == tables.PAGES[page](), (
        f"{page} is out of date: run python benchmarks/tables.py"
    )


def written(folder, name, found, device="NVIDIA H100"):
    record = {
        "bench": name,
        "command": f"python {name}",
        "date": "2026-01-02",
        "device": device,
        "versions": {"torch": "9"},
    }
    (folder / f"{name}.json").write_text(json.dumps(record | {"rounds": 3, "rows": found}))


def block(impl, attention_ms, density=1.0, **facts):
    rounds = Rounds({"dense": Timing((20.0,)), impl: Timing((10.0 + attention_ms,))})
    facts |= {
        "shape": SIZE,
        "attention_ms": attention_ms,
        "attention_share": 0.5,
        "model_speedup": 1.5,
        "depth": 7,
        "sdpa": "CUDNN_ATTENTION",
    }
    return row("case", "block", impl, rounds, "dense", density=density, **facts)


def attention(impl, ms, head_dim=64, blocks=(128, 128), **facts):
    rounds = Rounds({"cudnn": Timing((8.0,)), impl: Timing((ms,))}, {"broken": "RuntimeError: no"})
    op = "dense_fwd" if impl == "cudnn" else "block_sparse_fwd"
    size = SIZE | {"head_dim": head_dim, "blocks": list(blocks)}
    return row(f"case @ {ms}", op, impl, rounds, "cudnn", density=1.0 if impl == "cudnn" else 0.25, shape=size, **facts)


def test_a_bench_that_was_not_run_has_no_table(tmp_path):
    assert "|" not in bench_page.page(tmp_path)


def test_every_bench_has_its_table_with_device_date_and_command(tmp_path):
    method = {"method": "grat", "setting": "grat-B", "kernel": "hopper", "bound": 2.0, "bound_at_density": 1.6}
    written(
        tmp_path,
        "layers",
        [
            block("dense", 10.0),
            block("host", 10.0, overhead=0.01),
            block("grat", 2.5, 0.25, peak_bytes=2**31, **method),
        ],
    )
    peers = {"against_flash4": 1.2, "against_flash4_sparse": 0.98}
    moved = attention("permute", 1.0) | {"op": "permute", "tb_per_s": 2.5}
    written(
        tmp_path,
        "kernels",
        [attention("cudnn", 8.0), attention("hopper", 2.0, rel_l2=1e-3, **peers), attention("broken", 0.0), moved],
    )
    lost = {"peak_bytes": None, "extra_bytes": None, "extra_copies": None, "failed": "out of memory", "op": "block"}
    written(tmp_path, "peak_memory", [attention("sdpa", 1.0) | lost])
    page = bench_page.page(tmp_path)
    assert page.count("NVIDIA H100, torch 9, 2026-01-02") == 3 and "`python layers`" in page
    assert "| 0.250 | 12.50 ms | 2.50 ms | 1.60x | 1.60x | 2.00x | 1.50x of 7 blocks | 2.00 GiB |" in page
    assert (
        "| hopper | 0.250 | 2.00 ms | 4.00x | 1.00 | 1.20x | 0.98x | 1.0e-03 |" in page
        and "failed: RuntimeError: no" in page
    )
    assert "| permute | 1.00 ms | 2.50 |" in page and "failed: out of memory" in page


def test_linear_attention_and_cases_that_were_lost_are_drawn(tmp_path):
    gated = attention("triton", 2.0, rel_l2=2e-3) | {"op": "gated_linear_fwd", "gate": "vector", "against_fla": 3.5}
    refused = attention("broken", 0.0) | {"op": "gated_linear_fwd", "gate": "vector", "impl": "fla chunk_gla"}
    lost = attention("broken", 0.0) | {"case": "window", "op": "window", "impl": "none", "shape": {}}
    softmax = attention("cudnn", 8.0) | {"case": "16 x 4096", "gate": "vector"}
    written(tmp_path, "kernels", [attention("cudnn", 8.0), gated, softmax, refused, lost])
    page = bench_page.page(tmp_path)
    assert "| 1 x 4,096 x 24 x 64 | triton | 2.00 ms | 4.00x | 3.50x | 2.0e-03 |" in page
    assert "| fla chunk_gla | - | - | - | failed: RuntimeError: no |" in page
    assert "- window: failed: RuntimeError: no" in page
    assert page.count("| 16 x 4096 |") == 1 and page.index("| 16 x 4096 |") > page.index("### Gated linear")


def test_speeds_come_from_blocks_then_from_kernels_and_never_from_a_cpu(tmp_path):
    written(tmp_path, "layers", [block("dense", 10.0), block("grat", 2.5, 0.25, method="grat", kernel="hopper")])
    wide = attention("hopper", 4.0, head_dim=128)
    written(
        tmp_path,
        "kernels",
        [attention("hopper", 2.5), attention("triton", 4.0), attention("hopper", 3.0, blocks=(128, 64)), wide],
    )
    found = json.loads(preset_page.measured(tmp_path))
    assert found["share"]["case"]["value"] == 0.5
    assert {dim: figure["value"] for dim, figure in found["eff"].items()} == {"128": 1.0, "64": pytest.approx(0.65)}
    written(tmp_path, "layers", [block("dense", 10.0)], device="x86_64 CPU, 2 threads")
    assert json.loads(preset_page.measured(tmp_path))["share"] == {}


# ---- the command line
def test_presets_are_listed(capsys):
    assert cli.outcome_code(["methods", "--presets", "--json"], debug=True) == 0
    listed = json.loads(capsys.readouterr().out)
    assert sorted({r["name"] for r in listed}) == names() and all(r["share_source"] for r in listed)
    assert cli.outcome_code(["methods", "--presets"], debug=True) == 0
    assert "at most" in capsys.readouterr().out


def test_bench_passes_its_options_on_and_keeps_stdout_clean(capsys, monkeypatch, tmp_path):
    given = {}

    def run(what, **options):
        print("a row")
        given.update(options, what=what)
        options["out"].write_text('{"rows": []}')
        return options["out"]

    monkeypatch.setattr("foveal.pipelines.bench.__main__.run", run)
    out = str(tmp_path / "rows.json")
    arguments = [
        "bench",
        "layers",
        "--out",
        out,
        "--device",
        "cpu",
        "--seconds",
        "0.5",
        "--rounds",
        "4",
        "--tiny",
        "--cases",
        "tiny wan",
        "--json",
    ]
    assert cli.outcome_code(arguments, debug=True) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"rows": []} and "a row" in said.err
    assert given == {
        "what": "layers",
        "out": Path(out),
        "device": "cpu",
        "seconds": 0.5,
        "tiny": True,
        "cases": ["tiny wan"],
        "rounds": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "there is no bench 'nothing'"),
        (["kernels", "--device", "cpu"], "--tiny"),
        (["layers", "--tiny", "--device", "cpu", "--cases", "wan"], "choose from tiny wan"),
    ],
    ids=["unknown", "no GPU", "unknown case"],
)
def test_bench_refuses_in_one_sentence(capsys, arguments, said):
    assert cli.outcome_code(["bench", *arguments], debug=False) == 2
    assert said in capsys.readouterr().err
