"""Laws of what a result says, and of how it is written."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from foveal.pipelines.errors import UserError
from foveal.pipelines.host_info import host_info
from foveal.pipelines.result import bound, finite, write_result
from foveal.pipelines.samples import Cell, Sample, Store, open_folder, to_float, to_uint8, write_text
from foveal.pipelines.summary import print_outcome


def test_amdahl():
    assert bound(0.5) == 2 and bound(0.0) == 1 and bound(None) is None and bound(1.0) is None


def test_nothing_that_is_not_json_is_written(tmp_path):
    path = write_result(tmp_path, {"a": math.nan, "b": [math.inf, (1.5, None)]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, [1.5, None]]}
    assert finite({"x": (math.nan,)}) == {"x": [None]}


def test_the_host_record_names_no_one():
    text = json.dumps(host_info())
    assert "/" not in text.replace("x86_64", "") or "home" not in text
    assert {"cpu", "gpu", "torch", "threads", "python", "triton", "diffusers", "platform"} <= set(host_info())


# ---- samples on disk
def sample():
    video = to_uint8(torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(0)))
    return Sample(video, torch.randn(3, 2), {"seconds": 1.0})


def test_a_sample_comes_back_as_it_was(tmp_path):
    store, one = Store(tmp_path, "f"), sample()
    store.save("grat", Cell(0, 7), one)
    got = store.load("grat", Cell(0, 7))
    assert torch.equal(got.video, one.video) and torch.equal(got.latents, one.latents) and got.facts["seconds"] == 1.0
    assert store.has("grat", Cell(0, 7)) and not store.has("grat", Cell(1, 7))


def test_a_sample_of_another_fingerprint_or_damaged_is_refused(tmp_path):
    Store(tmp_path, "f").save("grat", Cell(0, 7), sample())
    with pytest.raises(UserError, match="another config or other weights"):
        Store(tmp_path, "g").has("grat", Cell(0, 7))
    path = Store(tmp_path, "f").path("grat", Cell(0, 7))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="delete it and run again"):
        Store(tmp_path, "f").load("grat", Cell(0, 7))


def test_bytes_and_floats_agree():
    video = sample().video
    assert torch.equal(to_uint8(to_float(video)[0]), video)


def test_an_animation_has_every_frame(tmp_path):
    from PIL import Image

    Store(tmp_path, "f").save("m", Cell(0, 0), sample())
    with Image.open(tmp_path / "media/m/0-0.webp") as image:
        assert image.n_frames == 3 and image.size == (20, 16)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\udcff")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_notes_of_another_config_do_not_count(tmp_path):
    assert Store(tmp_path, "f").note("k/../x", [1, 2]) == [1, 2]
    assert Store(tmp_path, "f").noted("k/../x") == [1, 2] and Store(tmp_path, "g").noted("k/../x") is None
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["k_.._x.json"]


def test_a_new_or_empty_folder_is_claimed(tmp_path):
    open_folder(tmp_path / "new" / "deep", "a: 1\n", lambda text: None)
    assert (tmp_path / "new" / "deep" / "config.yaml").read_text() == "a: 1\n"


# ---- the table
def document():
    metric = {
        "id": "psnr",
        "family": "fidelity",
        "value": 30.0,
        "ci95": [29.0, 31.0],
        "higher_is_better": True,
        "noise_floor": 90.0,
        "faithful": True,
    }
    dense = {"id": "dense", "name": "dense", "label": "dense", "density": {"mean": 1.0}, "metrics": [], "speed": {
        "end_to_end": {"median_s": 8.0}, "operator": {"ratio": 1.0, "efficiency": 1.0, "baseline": "sdpa flash"}, "speedup": {}}}  # fmt: skip
    grat = {"id": "g", "name": "grat", "label": "GRAT [b=1]", "density": {"mean": 0.25}, "metrics": [metric], "speed": {
        "end_to_end": {"median_s": 5.0}, "operator": {"ratio": 3.0, "efficiency": 0.75, "baseline": "sdpa flash"},
        "speedup": {"end_to_end": {"value": 1.6, "ci95": [1.5, 1.7]}, "amdahl_at_density": 1.8}}}  # fmt: skip
    study = {
        "title": "T", "note": "Toy model.", "methods": [dense, grat], "skipped": [{"id": "acc_all", "reason": "why"}],
        "model": {"id": "world-nano", "tokens": 512, "steps": 8, "guidance": 1.0, "dtype": "float32", "toy": True},
        "design": {"prompts": ["p"], "seeds": [0], "dense_steps": 0}, "amdahl": {"attention_share": 0.5, "bound": 2.0},
    }  # fmt: skip
    return {"studies": [study], "failed": [{"id": "x", "reason": "no weights"}]}


def test_the_table_states_bound_interval_floor_toy_and_failures():
    console = Console(file=io.StringIO(), width=200)
    print_outcome(document(), console)
    text = console.file.getvalue()
    for part in (
        "toy model",
        "1.60×",
        "1.80×",
        "2.00×",
        "30.0 [29.0, 31.0]",
        "GRAT [b=1]",
        "90.0",
        "sdpa flash",
        "why",
        "no weights",
        "Toy model.",
    ):
        assert part in text, part
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and "…" not in text
