"""The demo: says first that its models are toys, runs what is installed, names what is not."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_world import config

from foveal.pipelines import demo as demo_module
from foveal.pipelines.bench.rows import write
from foveal.pipelines.config import build, load
from foveal.pipelines.demo import FIRST_LINE, demo
from foveal.pipelines.engine import execute
from foveal.pipelines.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_page
import demo as demo_bench

pytestmark = pytest.mark.usefixtures("one_thread")


class Heard:
    """Keeps what is said."""

    def __init__(self):
        from foveal.pipelines.progress import Quiet

        self.lines, self.bar = [], Quiet().bar

    def say(self, text):
        self.lines.append(text)


def studies(model, output):
    small = {
        k: v
        for k, v in config(model, output, rounds=0, operator_rounds=0, step_samples=0, noise_floor_samples=0).items()
        if k != "output"
    }
    return {
        "output": str(output),
        "studies": [{**small, "id": "world-video", "model": "./nowhere/model"}, {**small, "id": "world-nano"}],
    }


def test_the_shipped_demo_is_two_studies_with_equal_dense_steps():
    found = {study.id: study for study in load("demo").studies}
    assert set(found) == {"world-video", "world-nano"} and not found["world-video"].intervals
    assert (len(found["world-nano"].prompts), len(found["world-nano"].seeds)) == (16, 2)
    for study in found.values():
        assert len({str(m.knobs.get("dense_steps", 0)) for m in study.methods if m.name != "dense"}) == 1


def test_the_first_line_says_toy(tiny_model, tmp_path, monkeypatch):
    heard = Heard()
    monkeypatch.setattr(demo_module, "load", lambda name, overrides: build(studies(tiny_model, tmp_path / "r")))
    demo(fast=True, voice=heard)
    assert heard.lines[0] == FIRST_LINE and "Toy" in FIRST_LINE


def test_a_study_without_weights_is_named_and_the_other_runs(tiny_model, tmp_path):
    outcome = execute(build(studies(tiny_model, tmp_path / "r")), verb="demo")
    assert [study["id"] for study in outcome.document["studies"]] == ["world-nano"]
    assert "there is no folder nowhere/model" in outcome.failures["world-video"]
    assert outcome.document["failed"][0]["id"] == "world-video"
    assert (tmp_path / "r/world-nano/media/dense/0-0.webp").is_file() and outcome.report.is_file()


def test_fast_runs_the_quality_study_only(tiny_model, tmp_path, monkeypatch):
    data = studies(tiny_model, tmp_path / "r")
    monkeypatch.setattr(demo_module, "load", lambda name, overrides: build(data))
    outcome = demo(fast=True)
    assert not outcome.failures and [s["id"] for s in outcome.document["studies"]] == ["world-nano"]
    assert outcome.document["command"] == "foveal demo --fast"
    assert yaml.safe_load((tmp_path / "r/config.yaml").read_text())["studies"][0]["id"] == "world-video"


def test_with_no_model_at_all_the_demo_is_one_sentence(tmp_path):
    data = studies("./nowhere/else", tmp_path / "r")
    with pytest.raises(UserError, match="there is no folder"):
        execute(build(data), verb="demo")


def test_its_figures_become_rows_and_a_table_a_study(tiny_model, tmp_path):
    data = studies(tiny_model, tmp_path / "r")
    small = data["studies"][1]
    data["studies"] = [{**small, "id": "timed", "rounds": 2, "title": "Speed"}, {**small, "id": "quality"}]
    outcome = execute(build(data), verb="demo")
    rows = demo_bench.rows_of(outcome.folder, 12.3)
    write(tmp_path / "results/demo.json", "demo", rows, torch.device("cpu"))
    record = json.loads((tmp_path / "results/demo.json").read_text())
    whole, dense, ours, *others = record["rows"]
    assert "CPU" in record["device"] and record["rounds"] == 1 and whole["ms"] == pytest.approx(12300)
    speed = outcome.document["studies"][0]["methods"][1]["speed"]
    assert ours["speedup"] == pytest.approx(dense["ms"] / ours["ms"]) == pytest.approx(speed["speedup"]["end_to_end"])
    assert ours["rounds"] == 2 and ours["ms_min"] < ours["ms_max"] and 0 < ours["density"] < 1
    assert ours["metrics"]["psnr"]["value"] < 100 and "psnr" not in dense["metrics"]
    assert {r["case"] for r in others} == {"quality"} and all(r["ms"] is None and "failed" not in r for r in others)
    page = bench_page.page(tmp_path / "results")
    assert "took 12 s" in page and f"| {ours['ms'] / 1e3:.2f} s | {ours['speedup']:.2f}x |" in page
    assert page.count("| GRAT |") == 2 and page.count("speed-up |") == 1
