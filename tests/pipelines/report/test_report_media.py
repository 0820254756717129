"""Laws of the pictures: lossless while they are small, honest when they are not, differences from the raw frames."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveal.pipelines.report import media
from foveal.pipelines.report.source import read_run


def decoded(sprite: media.Sprite) -> np.ndarray:
    """Frames of a sprite. -> uint8 [T, H, W, 3]"""
    data = base64.b64decode(sprite.uri.partition("base64,")[2])
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    h, w = sprite.height, sprite.width
    places = [divmod(i, sprite.columns) for i in range(sprite.frames)]
    return np.stack([picture[y * h : (y + 1) * h, x * w : (x + 1) * w] for y, x in places])


def noise(t: int, h: int, w: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (t, h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize("frames", [1, 2, 5, 16, 17])
def test_a_small_clip_comes_back_bit_by_bit(frames: int) -> None:
    video = noise(frames, 12, 10)
    sprite = media.shrunk(video, 10**6)
    assert sprite.note == "without loss"
    assert (decoded(sprite) == video).all()


def test_a_clip_beyond_its_share_is_compressed_and_says_so() -> None:
    sprite = media.shrunk(noise(4, 64, 64), 12_000)
    assert "as WebP of quality" in sprite.note
    assert len(sprite.uri) * 3 / 4 < 14_000


def test_a_large_long_clip_is_reduced_and_says_so() -> None:
    video = np.zeros((60, 300, 600, 3), np.uint8)
    sprite = media.shrunk(video, 10**6)
    assert (sprite.width, sprite.height, sprite.frames) == (256, 128, 48)
    assert sprite.note == "without loss, reduced from 600 × 300 pixels, 48 of 60 frames"


def test_identical_frames_differ_by_nothing() -> None:
    video = noise(3, 8, 8)
    away = media.difference(video, video)
    assert away.max() == 0 and media.frame_psnr(video, video) == (100.0,) * 3
    assert len(np.unique(media.paint(away, 4).reshape(-1, 3), axis=0)) == 1


def test_frame_psnr_is_the_textbook_formula() -> None:
    base = np.full((2, 4, 4, 3), 100, np.uint8)
    video = base.copy()
    video[1] += 10
    assert media.frame_psnr(video, base)[1] == pytest.approx(10 * np.log10(255**2 / 100))


@pytest.mark.parametrize(("size", "gain"), [(2, 16), (30, 8), (60, 4), (100, 2), (250, 2)])
def test_the_gain_keeps_differences_inside_the_scale(size: int, gain: int) -> None:
    assert media.choose_gain([np.full((1, 4, 4), size, np.float32)]) == gain


def test_brightness_of_the_difference_scale_only_grows() -> None:
    ramp = media.paint(np.arange(256, dtype=np.float32)[None, None, :], 1)[0, 0].astype(float)
    assert (np.diff(ramp @ [0.2126, 0.7152, 0.0722]) >= -0.5).all()


def test_every_prompt_comes_before_any_prompt_twice(tmp_path: Path, fabricated: Callable[..., Any]) -> None:
    fabricated(tmp_path)
    study = read_run(tmp_path).studies[1]
    assert [(s.prompt_index, s.seed) for s in media.samples(study)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_only_a_handful_of_samples_is_embedded(tmp_path: Path, fabricated: Callable[..., Any]) -> None:
    fabricated(tmp_path)
    study = read_run(tmp_path).studies[1]
    assert len(media.reels(study, 10**6, most=2)) == 2
