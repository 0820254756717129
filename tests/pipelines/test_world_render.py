"""Laws of the pictures."""

import pytest
import torch

from foveal.pipelines.world.prompts import draw_attributes
from foveal.pipelines.world.reader import STILL
from foveal.pipelines.world.render import (
    TRAVEL,
    backdrop,
    coverage,
    draw_path,
    paint,
    present,
    radii,
    render,
    travel_range,
)
from foveal.pipelines.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, attributes_of

REFERENCE = [  # mean, middle pixel over channels in frame 0, red of pixel (10, 20) in the last frame
    [0.319410, 0.260000, 0.320000],
    [0.299453, 0.260000, 0.320000],
    [0.203288, 0.214085, 0.170000],
    [0.330206, 0.261862, 0.250000],
]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(**words) -> Scene:
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
    middle = torch.full((1, 1, 1, 2), 0.5)
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
    path = draw_path(attributes, 16, rng(6))[:, 0]
    travel = (path[:, -1] - path[:, 0]).norm(dim=1)
    moving = attributes[:, 3] > 0
    assert (travel[~moving] == 0).all()
    assert (travel[moving] > TRAVEL[0] - 1e-4).all() and (travel[moving] < TRAVEL[1] + 1e-4).all()
    assert path.diff(n=2, dim=1).abs().max() < 1e-6


def test_gradients_reach_the_position():
    centre = torch.full((1, 1, 2, 2), 0.4, requires_grad=True)
    target = paint(attributes_of([scene()]), torch.full((1, 1, 2, 2), 0.5), 32)
    (paint(attributes_of([scene()]), centre, 32) - target).pow(2).sum().backward()
    assert (centre.grad < 0).all(), "descent moves the object towards the target"


def pairs(n: int):
    """Scenes with one or two objects in world 2, and their paths."""
    attributes = draw_attributes(n, rng(7), pairs=0.7)
    return attributes, draw_path(attributes, 16, rng(8), world=2)


def test_objects_of_world_two_stay_inside():
    attributes, path = pairs(400)
    room = radii(attributes)[:, :, None, None]
    there = present(attributes)
    assert (path - room)[there].min() > 0.0199 and (path + room)[there].max() < 0.9801


def test_travel_of_world_two_depends_on_the_radius_and_is_far_from_standing_still():
    radius = torch.tensor([0.10, 0.16, 0.17, 0.26])
    low, high = travel_range(radius, 2)
    torch.testing.assert_close(high, torch.tensor([0.70, 0.64, 0.62, 0.44]))
    assert low.min() > 2 * STILL and (high > low).all()
    attributes, path = pairs(400)
    low, high = travel_range(radii(attributes), 2)
    travel = (path[:, :, -1] - path[:, :, 0]).norm(dim=2)
    moving = torch.stack([attributes[:, 3], attributes[:, 9]], 1) > 0
    assert (travel[moving] > low[moving] - 1e-4).all() and (travel[moving] < high[moving] + 1e-4).all()
    assert (travel[~moving] == 0).all()


def test_paths_cross_but_leave_both_objects_readable():
    attributes, path = pairs(400)
    two = present(attributes)[:, 1]
    distance = (path[:, 0] - path[:, 1]).norm(dim=-1)[two] / radii(attributes)[two].sum(1, keepdim=True)
    depth = (1 - distance).clamp(min=0)
    assert (depth.amax(1) > 0.6).float().mean() > 0.15, "many pairs pass over each other"
    assert (depth.mean(1) > 0.31).float().mean() < 0.03


def test_the_second_object_covers_the_first():
    both = scene(colour="red", size="large", second=Thing("large", "blue", "square", "still"))
    middle = torch.full((1, 2, 1, 2), 0.5)
    picture = paint(attributes_of([both]), middle, 64)[0, 0]
    torch.testing.assert_close(picture[:, 32, 32], torch.tensor(COLOURS["blue"]), atol=0.02, rtol=0)
    apart = middle.clone()
    apart[:, 0, :, 0] = 0.2
    picture = paint(attributes_of([both]), apart, 64)[0, 0]
    torch.testing.assert_close(picture[:, 32, 12], torch.tensor(COLOURS["red"]), atol=0.02, rtol=0)


def test_an_absent_second_object_leaves_no_trace():
    attributes, path = draw_attributes(5, rng(1)), torch.rand(5, 2, 3, 2, generator=rng(2))
    assert torch.equal(paint(attributes, path, 24), paint(attributes, path[:, :1], 24))


def test_two_objects_are_smaller_than_one():
    both = scene(size="large", second=Thing("small", "blue", "cross", "up"))
    torch.testing.assert_close(radii(attributes_of([both, scene()])), torch.tensor([[0.17, 0.10], [0.26, 0.16]]))
    area = coverage(0, torch.tensor([0.17]), torch.full((1, 1, 2), 0.5), 64).mean()
    assert area.item() == pytest.approx(3.1416 * 0.17**2, rel=0.02)


def test_an_unknown_world_is_refused():
    with pytest.raises(ValueError, match="world 3 does not exist"):
        draw_path(draw_attributes(1, rng(0)), 4, rng(1), world=3)
