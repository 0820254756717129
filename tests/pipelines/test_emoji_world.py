"""Laws of the emoji world: its words, its scenes, its renderer and its exact reader."""

import numpy as np
import pytest
import torch

from foveal.pipelines.emoji.pictures import CODES, NAMES
from foveal.pipelines.emoji.png import read_png, write_png
from foveal.pipelines.emoji.reader import read, score
from foveal.pipelines.emoji.render import backdrop, render
from foveal.pipelines.emoji.scenes import draw_attributes, draw_positions, edges, held_out
from foveal.pipelines.emoji.sheet import FILE, pictures, sprites
from foveal.pipelines.emoji.vocabulary import (
    CANVASES,
    FIELDS,
    RELATIONS,
    UNITS,
    VOCAB,
    PromptError,
    Scene,
    attributes_of,
    canvas_of,
    parse,
    scenes_of,
    word_ids,
)

CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def scenes(n, seed=0, **options):
    generator = rng(seed)
    attributes = draw_attributes(n, generator, **options)
    return attributes, draw_positions(attributes, generator)


# ---- words
def test_every_scene_survives_its_prompt():
    attributes, _ = scenes(200)
    drawn = scenes_of(attributes)
    assert [parse(scene.prompt) for scene in drawn] == drawn
    assert torch.equal(attributes_of(drawn), attributes)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a large foxx on a mint plain background", "unknown picture 'foxx' .nearest: 'fox'"),
        ("a huge fox on a mint plain background", "unknown scale 'huge' .nearest: .* small, large"),
        ("a large fox on a mnit plain background", "unknown background 'mnit' .nearest: 'mint'"),
        ("a large fox on a mint plane background", "unknown style 'plane' .nearest: 'plain'"),
        ("a large fox near a large owl on a mint background", "unknown picture 'fox near a large owl'"),
        ("a small fox left of a large fox on a mint plain background", "names 'fox' twice"),
        ("fox", "does not fit the grammar: write"),
    ],
    ids=["picture", "scale", "background", "style", "relation", "twice", "grammar"],
)
def test_a_wrong_word_is_named_with_the_nearest(prompt, said):
    with pytest.raises(PromptError, match=said):
        parse(prompt)


def test_style_may_be_left_out_and_spelling_of_a_is_free():
    assert parse("An small  fox on an mint background.") == Scene("fox", "small", "mint")


def test_words_and_pictures_are_distinct():
    assert len(set(VOCAB)) == len(VOCAB) and len(set(NAMES)) == len(NAMES) == 64
    assert len({code for code, _ in CODES}) == len(CODES)


def test_null_is_for_what_is_not_there_and_every_word_has_its_id():
    one, two = attributes_of([parse("a small fox on a mint plain background"), scenes_of(scenes(1, pairs=1.0)[0])[0]])
    ids = word_ids(torch.stack([one, two]), 128)
    assert (ids[0] == 0).tolist() == [False, False, True, True, True, False, False, False] and (ids[1] > 0).all()
    for column, (_, words) in enumerate(FIELDS):
        for index, word in enumerate(words):
            row = torch.full((1, len(FIELDS)), -1)
            row[0, column] = index
            assert VOCAB[word_ids(row, 64)[0, column]] == word


@pytest.mark.parametrize(("size", "canvas"), [(64, 64), (128, 128), (192, 256), (256, 256), (384, 256), (512, 256)])
def test_the_canvas_word_is_the_nearest_trained_size(size, canvas):
    assert CANVASES[canvas_of(size)] == canvas
    assert VOCAB[word_ids(scenes(1)[0], size)[0, -1]] == f"{canvas} px"


# ---- scenes
@pytest.mark.parametrize("held", [False, True], ids=["seen", "held-out"])
def test_drawn_scenes_keep_to_their_side_of_the_split(held):
    attributes, _ = scenes(4000 if not held else 500, held=held)
    assert (held_out(attributes) == held).all()
    assert (attributes[:, 3] >= 0).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_the_split_does_not_depend_on_who_tells_the_scene():
    attributes, _ = scenes(500, pairs=1.0)
    other = attributes[:, [3, 4, 2, 0, 1, 5, 6]].clone()
    other[:, 2] = attributes[:, 2] ^ 1
    assert torch.equal(held_out(other), held_out(attributes))


def test_five_per_cent_of_single_scenes_are_held_out():
    table = torch.cartesian_prod(torch.arange(64), torch.zeros(1, dtype=torch.long), torch.arange(6))
    rows = torch.full((len(table), 7), -1)
    rows[:, 0], rows[:, 1], rows[:, 5], rows[:, 6] = table[:, 0], 0, 0, table[:, 2]
    assert held_out(rows).float().mean().item() == pytest.approx(0.05, abs=0.02)


def test_pictures_are_whole_apart_and_in_relation():
    attributes, positions = scenes(4000)
    paired = attributes[:, 3] >= 0
    for k, edge in enumerate(edges(attributes)):
        here = paired if k else torch.ones_like(paired)
        assert (positions[here, k] >= 1).all() and (positions[here, k] + edge[here, None] < UNITS).all()
    a, b = (2 * positions[:, k] + edge[:, None] for k, edge in enumerate(edges(attributes)))
    apart = (a - b)[paired]
    direction = torch.tensor(list(RELATIONS.values()))[attributes[paired, 2]]
    along, across = (apart * direction).sum(1), (apart * (1 - direction.abs())).abs().sum(1)
    assert (along > across).all()


# ---- pictures
def test_the_sheet_is_a_png_that_others_read_the_same():
    image = pytest.importorskip("PIL.Image")
    assert np.array_equal(np.asarray(image.open(FILE)), read_png(FILE)) and FILE.stat().st_size < 2 * 2**20


@pytest.mark.parametrize("channels", [3, 4], ids=["rgb", "rgba"])
def test_png_files_come_back_as_written(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, channels), dtype=np.uint8)
    write_png(tmp_path / "x.png", pixels)
    assert np.array_equal(read_png(tmp_path / "x.png"), pixels)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"x\.png is not a plain 8-bit"):
        read_png(tmp_path / "x.png")


def test_no_two_pictures_are_alike_and_none_is_empty():
    small = sprites(20, CPU).flatten(1)
    assert (small[:, -400:].mean(1) > 0.1).all()
    assert (torch.cdist(small, small) + 100 * torch.eye(len(small))).min() > 2


@pytest.mark.parametrize("size", [20, 96, 128, 192])
def test_no_sprite_is_brighter_than_its_opacity(size):
    found = sprites(size, CPU)
    assert found.shape == (64, 4, size, size) and (found[:, :3] <= found[:, 3:]).all() and found.min() >= 0
    if size == 128:
        assert torch.equal(found, pictures())


# ---- renderer and reader
@pytest.mark.parametrize("size", [64, 128])
def test_a_scene_is_its_backdrop_outside_its_pictures(size):
    attributes, positions = scenes(16)
    image, empty = render(attributes, positions, size), backdrop(attributes[:, 5], attributes[:, 6], size)
    unit = size // UNITS
    for i, (a, b) in enumerate(zip(*edges(attributes), strict=True)):
        outside = torch.ones(size, size, dtype=torch.bool)
        for (x, y), edge in zip((positions[i] * unit).tolist(), (int(a) * unit, int(b) * unit), strict=True):
            outside[y : y + edge, x : x + edge] = False
        assert torch.equal(image[i][:, outside], empty[i][:, outside])
        assert not torch.equal(image[i], empty[i])


def test_a_frame_that_is_no_multiple_of_64_is_refused():
    with pytest.raises(ValueError, match="100 px is no multiple of 64"):
        render(*scenes(1), 100)
    with pytest.raises(ValueError, match="S a multiple of 64"):
        read(torch.zeros(1, 3, 100, 100))


@pytest.mark.parametrize(("size", "n"), [(64, 48), (128, 48), (256, 24)])
def test_the_reader_is_exact_on_rendered_scenes(size, n):
    attributes, positions = scenes(n, seed=size)
    reading = read(render(attributes, positions, size))
    for name, values in score(reading, scenes_of(attributes)).items():
        assert values.nanmean() == 1, name
    assert (reading.emoji_psnr == 90).all()


def test_the_reader_bears_noise():
    attributes, positions = scenes(32, seed=3)
    image = render(attributes, positions, 128)
    reading = read(image + 0.1 * torch.randn(image.shape, generator=rng()))
    assert score(reading, scenes_of(attributes))["acc_all"].mean() == 1
    assert reading.emoji_psnr.mean().item() == pytest.approx(20.5, abs=1)


def test_a_pair_may_be_told_from_either_side():
    scene = parse("a small owl left of a large rose on a navy plain background")
    other = parse("a large rose right of a small owl on a navy plain background")
    attributes = attributes_of([scene])
    reading = read(render(attributes, draw_positions(attributes, rng()), 64))
    for asked in (scene, other):
        assert score(reading, [asked])["acc_all"].item() == 1


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ("a small owl right of a large rose on a navy plain background", {"acc_relation", "acc_all"}),
        ("a small owl left of a small rose on a navy plain background", {"acc_scale", "acc_all"}),
        ("a small owl left of a large rose on a navy striped background", {"acc_scene", "acc_all"}),
        (
            "a small owl left of a large star on a navy plain background",
            {"acc_object", "acc_pair", "acc_relation", "acc_scale", "acc_all"},
        ),
        ("a large owl on a navy plain background", {"acc_object", "acc_scale", "acc_all"}),
    ],
    ids=["relation", "scale", "style", "picture", "count"],
)
def test_each_score_sees_its_own_mistake(asked, wrong):
    attributes = attributes_of([parse("a small owl left of a large rose on a navy plain background")])
    reading = read(render(attributes, draw_positions(attributes, rng()), 64))
    scores = score(reading, [parse(asked)])
    assert {name for name, value in scores.items() if value.item() == 0} == wrong


def test_single_prompts_have_no_pair_scores():
    attributes, positions = scenes(2, pairs=0.0)
    found = score(read(render(attributes, positions, 64)), scenes_of(attributes))
    assert found["acc_pair"].isnan().all() and found["acc_relation"].isnan().all() and found["acc_all"].mean() == 1
