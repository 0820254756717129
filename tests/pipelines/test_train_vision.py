"""The training proof: both models are trained and judged alike, figures come with intervals, and judging changes nothing."""

import gzip
import json
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foveal.pipelines import train_vision
from foveal.pipelines.bench.rows import FIELDS
from foveal.pipelines.vision_proof.data import Batches, Pictures, enlarged, read
from foveal.pipelines.vision_proof.models import MODELS, Shape, build, weights_of
from foveal.pipelines.vision_proof.training import KEEP_EVERY, Recipe, Trainer, last_common, right, train, warm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import vision_page

CPU = torch.device("cpu")
SMALL = Shape(width=24, depth=1, heads=2)
RECIPE = Recipe(batch=16, rate=5e-3, warm_up=5)


def made_up(n, seed=0):
    """Pictures with one bright band of four: its height is the label, which mirroring does not change."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    images = rng.integers(0, 60, (n, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 150
    return images.astype(np.uint8), labels.astype(np.uint8)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The four files, two of them compressed, in a folder below."""
    place = tmp_path_factory.mktemp("data") / "below"
    place.mkdir()
    for stem, n, seed in (("train", 200, 0), ("t10k", 60, 1)):
        images, labels = made_up(n, seed)
        (place / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (place / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    return place.parent


def pictures(n, seed=0):
    images, labels = made_up(n, seed)
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def trainer(name, recipe=RECIPE, seed=0):
    return Trainer(build(name, SMALL, 8, seed, CPU), Batches(pictures(200), recipe.batch, 8, seed), recipe)


# ---- data
def test_files_are_read_as_they_were_written(folder):
    found = read(folder, "train")
    images, labels = made_up(200)
    assert np.array_equal(found.images.numpy(), images) and found.labels.tolist() == labels.tolist()
    assert len(read(folder, "test").first(7)) == 7


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no IDX file"), (b"\x00\x00\x08\x01" + struct.pack(">I", 3), "no IDX file"), (idx(np.zeros((2, 3, 3), np.uint8))[:-1], "should hold")],
    ids=["empty", "other axes", "cut off"],
)  # fmt: skip
def test_a_damaged_file_is_named(folder, tmp_path, content, said):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.*{said}|train-images-idx3-ubyte {said}"):
        read(tmp_path, "train")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte\.gz or train-images-idx3-ubyte below"):
        read(tmp_path, "train")


def test_enlarging_keeps_constants_and_mirrors_what_it_is_told():
    x = torch.arange(2 * 4 * 4, dtype=torch.uint8).view(2, 4, 4)
    same, flipped = enlarged(x, 4), enlarged(x, 4, torch.tensor([True, False]))
    assert torch.equal(flipped[0], same[0].flip(-1)) and torch.equal(flipped[1], same[1])
    even = enlarged(torch.full((1, 4, 4), 73, dtype=torch.uint8), 16)
    assert even.shape == (1, 1, 16, 16) and torch.allclose(even, even[0, 0, 0, 0])


def test_a_seed_draws_the_same_batches():
    one, two = (Batches(pictures(50), 8, 8, seed=3) for _ in range(2))
    for a, b in zip(one.draw(), two.draw(), strict=True):
        assert torch.equal(a, b)


# ---- models
@pytest.mark.parametrize("size", train_vision.SIZES, ids=lambda size: f"{size.tokens} tokens")
def test_both_models_have_nearly_as_many_weights_and_as_many_tokens(size):
    counts = {name: weights_of(build(name, Shape(), size.image, 0, CPU)) for name in MODELS}
    assert counts["vig"] == pytest.approx(counts["deit"], rel=0.05)
    for name in MODELS:
        model = build(name, SMALL, size.image, 0, CPU)
        assert model.pos_embed.shape[1] == size.tokens in (784, 3136)


def test_patches_must_divide_the_image():
    with pytest.raises(ValueError, match="30 pixels are no multiple of the patch of 4"):
        build("vig", SMALL, 30, 0, CPU)


# ---- training
@pytest.mark.parametrize("name", MODELS)
def test_models_learn(name):
    course = train(trainer(name), steps=80)
    test = pictures(100, seed=1)
    before, after = (right(course, step, test, 8, 50).double().mean() for step in (0, 80))
    assert after > 0.9 > 0.6 > before


def test_judging_leaves_the_model_as_it_was():
    course = train(trainer("vig"), steps=3)
    model = course.trainer.model
    before = [p.detach().clone() for p in model.parameters()]
    right(course, 0, pictures(10, seed=1), 8, 4)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_averages_are_kept_at_regular_steps_and_at_the_end():
    short, long = (train(trainer("deit"), steps=n) for n in (KEEP_EVERY + 3, 2 * KEEP_EVERY + 5))
    assert set(short.kept) == {0, KEEP_EVERY, KEEP_EVERY + 3} and short.steps == KEEP_EVERY + 3
    assert last_common([short, long]) == KEEP_EVERY
    for a, b in zip(short.kept[KEEP_EVERY], long.kept[KEEP_EVERY], strict=True):
        assert torch.equal(a, b)  # how long a run will be changes nothing before its end
    assert not all(torch.equal(a, b) for a, b in zip(long.kept[KEEP_EVERY], long.kept[2 * KEEP_EVERY], strict=True))


def test_steps_after_a_run_are_no_part_of_it():
    course = train(trainer("deit"), steps=4)
    last = [x.clone() for x in course.kept[4]]
    course.trainer.step()
    assert course.steps == 4 and all(torch.equal(a, b) for a, b in zip(last, course.kept[4], strict=True))


def test_seconds_end_a_run():
    course = train(trainer("deit", replace(RECIPE, batch=2)), seconds=0.2)
    assert 0.2 <= course.seconds < 5 and course.steps % 10 == 0


@pytest.mark.parametrize("length", [{}, {"seconds": 1.0, "steps": 3}], ids=["neither", "both"])
def test_a_run_needs_one_length(length):
    with pytest.raises(ValueError, match="give seconds or steps"):
        train(trainer("deit"), **length)


def test_warming_up_does_not_train():
    one = trainer("vig")
    before = [p.detach().clone() for p in one.model.parameters()]
    first = one.batches.generator.get_state()
    warm(one)
    assert one.steps == 0 and all(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))
    assert torch.equal(first, one.batches.generator.get_state())


# ---- the command
@pytest.fixture(scope="module")
def record(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "training_proof.json"
    train_vision.run(folder, steps=25, out=path, device="cpu", tiny=True, rounds=2)
    return json.loads(path.read_text())


def test_the_record_has_the_schema(record):
    assert record["bench"] == "training_proof" and record["rounds"] == 2 and "timm" in record["versions"]
    assert all(set(FIELDS) <= set(r) for r in record["rows"])
    assert [r["impl"] for r in record["rows"]] == ["deit", "vig"] and {r["baseline"] for r in record["rows"]} == {
        "deit"
    }
    assert {r["peak_bytes"] for r in record["rows"]} == {None}  # the allocator of a CPU does not say


def test_accuracies_have_intervals_and_differences_are_paired(record):
    deit, vig = record["rows"]
    for moment in ("equal_time", "equal_steps"):
        for r in (deit, vig):
            got = r[moment]["accuracy"]
            assert 0 <= got["low"] <= got["value"] <= got["high"] <= 1 and r["test_pictures"] == 60
        gain = vig[moment]["difference"]
        assert deit[moment]["difference"] is None and gain["low"] <= gain["value"] <= gain["high"]
        assert gain["value"] == pytest.approx(vig[moment]["accuracy"]["value"] - deit[moment]["accuracy"]["value"])
        assert deit[moment]["steps"] == vig[moment]["steps"] == 25


def test_the_record_is_drawn(record):
    page = vision_page.training_proof(record)
    assert page.count("| 16 tokens |") == 2 and "of 60 test pictures" in page and "| vig | 0.02 M |" in page


@pytest.mark.parametrize("given", [[], ["--steps", "1", "--seconds", "1"]], ids=["no length", "two lengths"])
def test_the_command_needs_one_length(capsys, given):
    with pytest.raises(SystemExit) as stop:
        train_vision.main(["--data", ".", *given])
    assert stop.value.code == 2 and "--steps" in capsys.readouterr().err


def test_an_unknown_size_is_answered_with_the_known_ones(folder, tmp_path):
    with pytest.raises(ValueError, match="no size 100; there are 112 and 224 pixels"):
        train_vision.run(folder, steps=1, out=tmp_path / "x.json", device="cpu", images=[100])
