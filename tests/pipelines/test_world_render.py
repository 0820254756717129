"""Laws of the pictures."""

import pytest
import torch

from foveal.pipelines.world.prompts import draw_attributes
from foveal.pipelines.world.render import TRAVEL, backdrop, draw_path, paint, render
from foveal.pipelines.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES, Scene, attributes_of

REFERENCE = [  # mean, middle pixel over channels in frame 0, red of pixel (10, 20) in the last frame
    [0.319410, 0.260000, 0.320000],
    [0.299453, 0.260000, 0.320000],
    [0.203288, 0.214085, 0.170000],
    [0.330206, 0.261862, 0.250000],
]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(**words: str) -> Scene:
    default = {"size": "large", "colour": "red", "shape": "circle", "motion": "still"}
    return Scene(**{**default, "style": "plain", "background": "navy", **words})


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (16, 64), (3, 24)])
def test_clips_have_the_documented_shape_and_range(frames, size):
    clip = render(draw_attributes(3, rng(0)), frames, size, rng(1))
    assert clip.shape == (3, frames, 3, size, size) and clip.dtype == torch.float32
    assert clip.min() >= 0 and clip.max() <= 1


def test_pictures_are_those_the_shipped_weights_were_trained_on():
    clip = render(draw_attributes(4, rng(3)), 8, 32, rng(4))
    reference = torch.tensor(REFERENCE)
    found = torch.stack([clip.mean((1, 2, 3, 4)), clip[:, 0, :, 16, 16].mean(1), clip[:, -1, 0, 10, 20]], 1)
    torch.testing.assert_close(found, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_inside_is_the_colour_and_outside_the_background(shape):
    middle = torch.full((1, 1, 2), 0.5)
    picture = paint(attributes_of([scene(shape=shape)]), middle, 64)[0, 0]
    x = 32 + (round(0.8 * 0.26 * 64) if shape == "ring" else 0)
    torch.testing.assert_close(picture[:, 32, x], torch.tensor(COLOURS["red"]), atol=0.02, rtol=0)
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor(BACKGROUNDS["navy"]), atol=0.02, rtol=0)


def test_checker_and_stripes_have_eight_cells_across():
    tone = backdrop(torch.tensor([1, 2]), torch.tensor([0, 0]), 64)[:, 0] - BACKGROUNDS["black"][0]
    assert (tone[1, 0].diff().abs() > 0.05).sum() == 7 and (tone[1, :, 0].diff().abs() > 0.05).sum() == 0
    assert (tone[0, 0].diff().abs() > 0.05).sum() == 7 and (tone[0, :, 0].diff().abs() > 0.05).sum() == 7


def test_paths_are_straight_and_as_long_as_documented():
    attributes = draw_attributes(64, rng(5))
    path = draw_path(attributes, 16, rng(6))
    travel = (path[:, -1] - path[:, 0]).norm(dim=1)
    moving = attributes[:, 3] > 0
    assert (travel[~moving] == 0).all()
    assert (travel[moving] > TRAVEL[0] - 1e-4).all() and (travel[moving] < TRAVEL[1] + 1e-4).all()
    assert path.diff(n=2, dim=1).abs().max() < 1e-6


def test_gradients_reach_the_position():
    centre = torch.full((1, 2, 2), 0.4, requires_grad=True)
    target = paint(attributes_of([scene()]), torch.full((1, 2, 2), 0.5), 32)
    (paint(attributes_of([scene()]), centre, 32) - target).pow(2).sum().backward()
    assert (centre.grad < 0).all(), "descent moves the object towards the target"
