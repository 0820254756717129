"""Laws of the exact reader."""

from dataclasses import fields

import pytest
import torch

from foveal.pipelines.world import reader
from foveal.pipelines.world.prompts import draw_attributes
from foveal.pipelines.world.reader import Reading, direction_error, read, score
from foveal.pipelines.world.render import render
from foveal.pipelines.world.vocabulary import scenes_of

ATTRIBUTES = {"acc_colour", "acc_shape", "acc_size", "acc_motion", "acc_scene"}
ACCURACIES = {*ATTRIBUTES, "acc_all", "acc_count", "acc_objects"}


def clips(n: int, frames: int, size: int):
    attributes = draw_attributes(n, torch.Generator().manual_seed(3))
    return render(attributes, frames, size, torch.Generator().manual_seed(4)), attributes


def noisy(frames: torch.Tensor, sd: float) -> torch.Tensor:
    """Noise of standard deviation sd on pixels in [-1, 1]."""
    return frames + sd / 2 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("n", "frames", "size"), [(192, 8, 32), (48, 16, 64)])
def test_rendered_clips_are_read_without_error(n, frames, size):
    video, attributes = clips(n, frames, size)
    reading = read(video)
    assert len(reading) == n and reading.scenes() == scenes_of(attributes)
    rates = score(reading, scenes_of(attributes))
    assert set(rates) == ACCURACIES and all((value == 1).all() and value.shape == (n,) for value in rates.values())
    assert reading.world_psnr.mean() > 55 and reading.jitter.mean() < 2e-3
    moving = attributes[:, 3] > 0
    assert reading.angle_error[moving, 0].max() < 0.3 and reading.angle_error[~moving].isnan().all()
    assert (reading.objects == 1).all() and reading.displacement[:, 1].isnan().all()
    assert direction_error(reading, scenes_of(attributes))[moving].max() < 0.3
    assert reading.displacement[~moving, 0].max() < 1e-4
    for size_index, expected in ((0, 0.61), (1, 0.60)):
        chosen = moving & (attributes[:, 0] == size_index)
        assert reading.displacement[chosen, 0].mean() == pytest.approx(expected, abs=0.02)
    assert reading.colour_drift.mean() < 3e-3 and reading.area_drift.mean() < 1e-2


def test_noise_behaves_as_specified():
    video, attributes = clips(128, 8, 32)
    light, heavy = read(noisy(video, 0.1)), read(noisy(video, 0.3))
    assert score(light, scenes_of(attributes))["acc_all"].mean() == 1
    rates = {name: value.mean().item() for name, value in score(heavy, scenes_of(attributes)).items()}
    assert 0.6 < rates["acc_colour"] < 0.9 and 0.4 < rates["acc_shape"] < 0.75 and rates["acc_scene"] == 1
    assert light.world_psnr.mean() == pytest.approx(26.1, abs=0.3)
    assert heavy.world_psnr.mean() == pytest.approx(15.3, abs=0.4)
    assert light.jitter.mean() == pytest.approx(0.0024, abs=5e-4)
    assert heavy.jitter.mean() == pytest.approx(0.0069, abs=1e-3)


def test_drift_sees_changes_of_colour_and_area():
    video, _ = clips(8, 8, 32)
    clean, flicker = read(video), video.clone()
    flicker[:, ::2] *= 0.8
    assert (read(flicker).colour_drift > clean.colour_drift + 0.01).all()
    assert (read(noisy(video, 0.3)).area_drift.mean() > 3 * clean.area_drift.mean()).all()


def test_chunks_do_not_change_a_reading(monkeypatch):
    video, _ = clips(7, 8, 32)
    whole = read(video)
    monkeypatch.setattr(reader, "CHUNK", 2 * 8 * 32 * 32)
    parts = read(video)
    for field in fields(Reading):
        torch.testing.assert_close(getattr(parts, field.name), getattr(whole, field.name), equal_nan=True)


def test_opposite_motion_is_180_degrees_off():
    video, attributes = clips(16, 8, 32)
    backwards = read(video.flip(1))
    moving = attributes[:, 3] > 0
    assert direction_error(backwards, scenes_of(attributes))[moving].min() > 179


@pytest.mark.parametrize("shape", [(8, 3, 32, 32), (1, 3, 8, 32, 32), (1, 1, 3, 32, 32), (1, 8, 3, 32, 16)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"pass \[B, T, 3, S, S\]"):
        read(torch.zeros(shape))


def test_scenes_must_match_the_clips():
    video, attributes = clips(2, 8, 32)
    with pytest.raises(ValueError, match="1 scenes for 2 clips"):
        score(read(video), scenes_of(attributes[:1]))
