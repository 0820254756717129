"""The command line: exit codes, one-sentence errors, clean JSON, a quick front door."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foveal import cli
from foveal.cli import outcome_code

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))


def call(capsys, *arguments):
    code = outcome_code(list(arguments), debug=False)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("command", ["demo", "run", "compare", "methods", "inspect", "doctor"])
def test_every_command_has_help_and_json(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and "--json" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "no-such-file.yaml"], "no config file"),
        (["run"], "Missing argument"),
        (["runn"], "runn"),
        (["run", "demo", "a.b"], "key=value"),
        (["methods", "gart"], "did you mean 'grat'"),
        (["compare", "compare_world_nano", "modl=x"], "did you mean 'model'"),
        (["inspect", "flux_grat"], "there is no folder models/FLUX.1-dev"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, arguments, text):
    code, out, err = call(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("foveal: ")]
    assert code == 2 and len(lines) == 1 and text in lines[0] and "Traceback" not in err and out == ""


def test_a_mistake_with_json_is_json(capsys):
    code, out, _ = call(capsys, "run", "no-such-file.yaml", "--json")
    assert code == 2 and json.loads(out)["exit_code"] == 2


def test_a_crash_is_exit_code_1_and_debug_shows_it(capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("foveal.pipelines.catalogue.method_rows", broken)
    code, _, err = call(capsys, "methods")
    assert code == 1 and err == "foveal: the run failed: RuntimeError: out of memory (--debug shows where)\n"
    with pytest.raises(RuntimeError):
        outcome_code(["methods"], debug=True)


def test_ctrl_c_is_130(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("foveal.pipelines.catalogue.method_rows", interrupted)
    assert call(capsys, "methods")[0] == 130


def test_methods_lists_all_and_third_party_ones(capsys, monkeypatch):
    from foveal.plugins.methods.grat import GRAT

    monkeypatch.setattr(
        "foveal.pipelines.catalogue.methods",
        lambda: {"grat": GRAT, "theirs": type("Theirs", (GRAT,), {"__module__": "theirs.attention"})},
    )
    code, out, _ = call(capsys, "methods")
    assert code == 0 and "grat" in out and "from theirs" in out


def test_json_of_methods_and_metrics(capsys):
    rows = json.loads(call(capsys, "methods", "--json")[1])
    assert rows[0]["name"] == "dense" and any("group" in row["knobs"] for row in rows)
    assert {"psnr", "ssim"} <= {row["id"] for row in json.loads(call(capsys, "methods", "--metrics", "--json")[1])}


def test_doctor_runs_the_kernels_it_reports(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    found = json.loads(out)
    states = {row["implementation"]: row["state"] for row in found["kernels"]}
    assert states["torch"] == "works" and states["reference"] == "works"
    assert code == (0 if found["healthy"] else 1)


def test_doctor_reports_a_changed_file(capsys, monkeypatch, tmp_path, tiny_folder):
    import dataclasses

    from foveal.pipelines import shipped

    card = dataclasses.replace(shipped.cards()[0], folder=tiny_folder)
    monkeypatch.setattr(shipped, "cards", lambda: [card])
    assert json.loads(call(capsys, "doctor", "--json")[1])["models"][0]["state"] == "ok"
    with (tiny_folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 1 and json.loads(out)["models"][0]["state"].startswith("damaged")


@pytest.fixture
def tiny_folder(tmp_path):
    from tiny_world import make_model

    return make_model(tmp_path)


@pytest.fixture
def tiny_yaml(tiny_folder, tmp_path):
    import yaml
    from tiny_world import config

    path = tmp_path / "tiny.yaml"
    changes = {
        "seeds": [0],
        "rounds": 0,
        "operator_rounds": 0,
        "step_samples": 0,
        "noise_floor_samples": 0,
        "metrics": ["psnr"],
    }
    path.write_text(yaml.safe_dump(config(tiny_folder, tmp_path / "out", **changes)))
    return path


def test_run_prints_a_table_and_the_report(capsys, tiny_yaml, tmp_path):
    code, out, _ = call(capsys, "run", str(tiny_yaml))
    assert code == 0 and "| GRAT" in out and str(tmp_path / "out" / "report.html") in out
    code, out, err = call(capsys, "run", str(tiny_yaml), "--json")
    assert code == 0 and json.loads(out)["report"] and err == ""


def test_inspect_draws_and_tells(capsys, tiny_yaml, tmp_path):
    code, out, _ = call(capsys, "inspect", str(tiny_yaml), "--out", str(tmp_path / "look"), "--json")
    method = json.loads(out)["studies"][0]["methods"][0]
    assert (
        code == 0 and method["density"] == pytest.approx(10 / 16) and all(Path(p).is_file() for p in method["pictures"])
    )
    assert {row["role"] for row in method["layers"]} >= {"self"}
    assert "density 0.625" in call(capsys, "inspect", str(tiny_yaml), "--out", str(tmp_path / "look"))[1]


# ---- the front door
def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    ).stdout


def test_importing_foveal_imports_nothing_heavy_and_is_quick():
    code = (
        "import sys, time; t = time.perf_counter(); import foveal, foveal.cli; s = time.perf_counter() - t;"
        "print([m for m in ('torch', 'triton', 'diffusers', 'timm', 'numpy') if m in sys.modules], s < 1.0)"
    )
    assert python(code).split() == ["[]", "True"]


def test_every_public_name_resolves():
    code = "import foveal; print(all(getattr(foveal, n) is not None for n in foveal.__all__), set(foveal.__all__) <= set(dir(foveal)))"
    assert python(code).split() == ["True", "True"]


def test_the_front_door_works_without_diffusers_and_triton():
    code = (
        "import sys; sys.modules.update(diffusers=None, triton=None, timm=None);"
        "import foveal, torch; q = torch.randn(1, 1, 8, 4); n = torch.tensor([4, 4]); i = torch.tensor([[0], [1]]); o = torch.tensor([1, 1]);"
        "p = foveal.BlockPlan(n_queries=8, n_keys=8, q_start=n - 4 + n * torch.arange(2), q_len=n, kv_start=n - 4 + n * torch.arange(2), kv_len=n,"
        " count=o, n_full=o, index=i);"
        "print(foveal.block_sparse_attention(q, q, q, p).shape == q.shape, 'grat' in foveal.methods())"
    )
    assert python(code).split() == ["True", "True"]


def test_an_unknown_name_is_an_attribute_error():
    import foveal

    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = foveal.nothing_like_this


def test_python_dash_m_ends_with_the_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "foveal", "run", "nope"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (
        done.returncode == cli.BAD_INPUT
        and done.stdout == ""
        and done.stderr.startswith("foveal: no config file at nope")
    )
