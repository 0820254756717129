"""Laws of the reader on clips with two objects, crossing paths included."""

from dataclasses import fields, replace

import pytest
import torch

from foveal.pipelines.world import reader
from foveal.pipelines.world.prompts import draw_attributes, validation_prompts
from foveal.pipelines.world.reader import Reading, direction_error, read, score
from foveal.pipelines.world.render import draw_path, paint, present, radii
from foveal.pipelines.world.vocabulary import Scene, Thing, attributes_of, describe, parse, scenes_of


def clips(n: int, size: int, frames: int = 16, pairs: float = 1.0):
    attributes = draw_attributes(n, torch.Generator().manual_seed(11), pairs=pairs)
    path = draw_path(attributes, frames, torch.Generator().manual_seed(12), world=2)
    return paint(attributes, path, size), attributes, path


def noisy(frames: torch.Tensor, sd: float) -> torch.Tensor:
    """Noise of standard deviation sd on pixels in [-1, 1]."""
    return frames + sd / 2 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("n", "size"), [(96, 32), (32, 64)])
def test_two_objects_are_read_without_error(n, size):
    video, attributes, path = clips(n, size)
    reading = read(video)
    rates = score(reading, scenes_of(attributes))
    assert {name: value.mean().item() for name, value in rates.items()} == dict.fromkeys(rates, 1.0)
    assert (reading.objects == 2).all() and reading.world_psnr.min() > 80
    assert reading.jitter.max() < 1e-5 and direction_error(reading, scenes_of(attributes)).nan_to_num(0).max() < 0.01
    travel = (path[:, :, -1] - path[:, :, 0]).norm(dim=2).sum(1)
    torch.testing.assert_close(reading.displacement.sum(1), travel, atol=1e-4, rtol=0)
    assert reading.colour_drift.max() < 1e-4 and reading.area_drift.mean() < 0.03


def test_one_object_and_two_are_told_apart():
    video, attributes, _ = clips(96, 32, frames=8, pairs=0.5)
    reading = read(video)
    assert torch.equal(reading.objects == 2, present(attributes)[:, 1])
    assert (score(reading, scenes_of(attributes))["acc_all"] == 1).all()


def test_noise_does_not_add_or_hide_objects():
    video, attributes, _ = clips(64, 32, frames=8, pairs=0.5)
    reading = read(noisy(video, 0.1))
    assert score(reading, scenes_of(attributes))["acc_all"].mean() == 1
    assert reading.world_psnr.mean() == pytest.approx(26.1, abs=0.3) and reading.jitter.mean() < 3e-3


def test_objects_that_pass_over_each_other_are_followed_through():
    video, attributes, path = clips(128, 32)
    distance = (path[:, 0] - path[:, 1]).norm(dim=-1).amin(1) / radii(attributes).sum(1)
    crossing = distance < 0.3
    assert crossing.sum() >= 15
    assert (score(read(video[crossing]), scenes_of(attributes[crossing]))["acc_all"] == 1).all()


def test_which_object_is_which_is_not_taken_from_the_prompt():
    video, attributes, _ = clips(16, 32, frames=8)
    reading, scenes = read(video), scenes_of(attributes)
    turned = [parse(describe(_swapped(scene))) for scene in scenes]
    assert (score(reading, turned)["acc_all"] == 1).all()
    torch.testing.assert_close(direction_error(reading, turned), direction_error(reading, scenes), equal_nan=True)


def test_the_object_in_front_is_read_as_the_second():
    middle = torch.full((1, 2, 4, 2), 0.5)
    middle[0, 0, :, 0] = torch.tensor([0.3, 0.35, 0.4, 0.45])
    things = (Thing("large", "red", "circle", "right"), Thing("large", "blue", "square", "still"))
    for low, high in (things, things[::-1]):
        scene = Scene(low.size, low.colour, low.shape, low.motion, "plain", "navy", high)
        path = middle if low is things[0] else middle.flip(1)
        assert read(paint(attributes_of([scene]), path, 48)).scenes()[0].second == high or low.motion == "right"
        assert read(paint(attributes_of([scene]), path, 48)).scenes()[0].second.colour == high.colour


def test_a_missing_object_reads_as_one_and_scores_wrong():
    _, attributes, path = clips(24, 32, frames=8)
    alone = attributes.clone()
    alone[:, 6:] = -1
    reading = read(paint(alone, path, 32))
    assert (reading.objects == 1).all()
    rates = score(reading, scenes_of(attributes))
    assert all((rates[name] == 0).all() for name in ("acc_count", "acc_objects", "acc_all", "acc_colour"))
    assert (rates["acc_scene"] == 1).all()


def test_an_object_too_many_scores_wrong():
    video, attributes, _ = clips(24, 32, frames=8)
    fewer = attributes.clone()
    fewer[:, 6:] = -1
    rates = score(read(video), scenes_of(fewer))
    assert (rates["acc_all"] == 0).all() and (rates["acc_count"] == 0).all() and (rates["acc_colour"] == 1).all()


def test_one_wrong_attribute_of_one_object_is_seen():
    video, attributes, _ = clips(24, 32, frames=8)
    asked = [
        _with_second(scene, size="small" if scene.second.size == "large" else "large")
        for scene in scenes_of(attributes)
    ]
    rates = score(read(video), asked)
    assert (rates["acc_size"] == 0).all() and (rates["acc_all"] == 0).all() and (rates["acc_objects"] == 0).all()
    assert all((rates[name] == 1).all() for name in ("acc_colour", "acc_shape", "acc_motion", "acc_scene", "acc_count"))


def test_jitter_and_direction_error_grow_with_the_fault():
    _, attributes, path = clips(24, 32)
    shaken = path + 0.02 * torch.randn(path.shape, generator=torch.Generator().manual_seed(2))
    straight, jittery = read(paint(attributes, path, 32)), read(paint(attributes, shaken, 32))
    assert jittery.jitter.mean() == pytest.approx(0.024, abs=0.008) and straight.jitter.mean() < 1e-4
    assert jittery.world_psnr.mean() > 60, "positions are free, so shaking is no error of the picture"
    backwards = direction_error(read(paint(attributes, path.flip(2), 32)), scenes_of(attributes))
    moving = (attributes[:, 3] > 0) & (attributes[:, 9] > 0)
    assert backwards[moving].min() > 179


def test_drift_sees_changes_of_colour():
    video, _, _ = clips(8, 32, frames=8)
    flicker = video.clone()
    flicker[:, ::2] *= 0.85
    assert (read(flicker).colour_drift > read(video).colour_drift + 0.01).all()


def test_chunks_do_not_change_a_reading(monkeypatch):
    video, _, _ = clips(7, 32, frames=8, pairs=0.5)
    whole = read(video)
    monkeypatch.setattr(reader, "CHUNK", 2 * 8 * 32 * 32)
    parts = read(video)
    for field in fields(Reading):
        found, expected = getattr(parts, field.name), getattr(whole, field.name)
        torch.testing.assert_close(found, expected, equal_nan=True, atol=2e-3, rtol=1e-3)


GARBAGE = {
    "noise": lambda rng: torch.rand(2, 4, 3, 32, 32, generator=rng),
    "black": lambda rng: torch.zeros(2, 4, 3, 32, 32),
    "white": lambda rng: torch.ones(2, 4, 3, 32, 32),
    "nan": lambda rng: torch.full((2, 4, 3, 32, 32), torch.nan),
    "infinite": lambda rng: torch.full((2, 4, 3, 32, 32), torch.inf),
    "half red half blue": lambda rng: torch.cat(
        [torch.tensor([0.9, 0.1, 0.1]).view(1, 1, 3, 1, 1).expand(1, 4, 3, 16, 32),
         torch.tensor([0.1, 0.3, 0.9]).view(1, 1, 3, 1, 1).expand(1, 4, 3, 16, 32)], 3),
    "flashes": lambda rng: (torch.rand(2, 4, 1, 1, 1, generator=rng) > 0.5).float().expand(2, 4, 3, 32, 32),
    "two frames, 8 pixels": lambda rng: torch.rand(3, 2, 3, 8, 8, generator=rng),
    "half precision": lambda rng: torch.rand(1, 3, 3, 16, 16, generator=rng).half(),
    "no clips left over": lambda rng: torch.rand(1, 2, 3, 4, 4, generator=rng),
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_read_without_a_crash(kind):
    video = GARBAGE[kind](torch.Generator().manual_seed(5))
    reading = read(video)
    assert len(reading) == len(video) and all(isinstance(scene, Scene) for scene in reading.scenes())
    assert reading.world_psnr.isfinite().all() and reading.jitter.isfinite().all()
    rates = score(reading, [parse(prompt) for prompt in validation_prompts(len(video), objects=2)])
    assert all(value.isfinite().all() for value in rates.values())


def _swapped(scene: Scene) -> Scene:
    first, second = scene.things
    return Scene.of(second, scene.style, scene.background, first)


def _with_second(scene: Scene, **words: str) -> Scene:
    first, second = scene.things
    return Scene.of(first, scene.style, scene.background, replace(second, **words))
