"""Grids and spans at awkward sizes, against rows of V: one changed input token changes one row, and says where that token lies.

Letters: N tokens of a sequence. Only the first attention call of a forward is looked at; there, V is still one row per token.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from host_oracle import Stop

from foveal.plugins.accelerate import accelerate
from foveal.plugins.method import Method
from foveal.plugins.site import Span

pytestmark = pytest.mark.filterwarnings("ignore")
PICTURES, VIDEOS = [(1, 45, 53), (1, 83, 31), (1, 13, 83)], [(2, 13, 31), (3, 31, 13), (2, 45, 53)]
CASES = [(n, g) for n in sorted(zoo.SHAPES) for g in (PICTURES if zoo.SHAPES[n].grid[0] == 1 else VIDEOS)]
IDS = [f"{name}-{'x'.join(map(str, grid))}" for name, grid in CASES]


@dataclass(frozen=True, kw_only=True)
class First(Method):
    """Stops the forward at the first call of a role, with its site and V."""

    name: ClassVar[str] = "first"
    role: str = ""

    def plan(self, q, k, v, site, state):
        if site.role == self.role or not self.role:
            raise Stop(site, v[0].transpose(0, 1).flatten(1).clone())


def first_call(model, inputs, role=""):
    """-> site, v [N, H D] of the first sample"""
    with accelerate(model, First(role=role)), pytest.raises(Stop) as caught, torch.no_grad():
        model(**inputs)
    return caught.value.args


def changed(name, inputs, grid, at=None):
    """The inputs with the generated tokens changed: all of them, or the one at (t, h, w)."""
    shape, inputs = zoo.SHAPES[name], dict(inputs)
    key = "x" if shape.visual == "list" else "hidden_states"
    x = inputs[key][0].clone() if shape.visual == "list" else inputs[key].clone()
    p, (t, h, w) = (2 if shape.visual == "list" else shape.patch), at or (None,) * 3
    if shape.visual == "tokens":
        n = grid[0] * grid[1] * grid[2]
        x[0, slice(0, n) if at is None else (t * grid[1] + h) * grid[2] + w] += 3
    elif at is None:
        x += 3
    else:
        pixel = (
            x[0, t * (x.shape[1] // grid[0])]
            if shape.visual == "frames"
            else x[..., t, :, :]
            if x.ndim > 3 and grid[0] > 1
            else x
        )
        pixel[..., p * h, p * w] += 3
    return {**inputs, key: [x, *inputs[key][1:]] if shape.visual == "list" else x}


def moved_rows(before, after):
    return ((before - after).abs().amax(1) > 1e-6).nonzero().flatten().tolist()


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_grid_and_spans_at_awkward_sizes(name, grid):
    shape, (model, inputs) = zoo.SHAPES[name], zoo.build(name, grid)
    site, v = first_call(model, inputs, "joint" if shape.text else "self")
    n, extra = grid[0] * grid[1] * grid[2], shape.extra(grid)
    start = shape.text if shape.text_first else 0
    assert site.grid == grid and site.tokens == len(v) == n + extra + shape.text
    assert site.visual == Span(start, start + n)
    assert site.extra == ((Span(start + n, start + n + extra),) if extra else ())
    text = Span(0, shape.text) if shape.text_first else Span(n + extra, n + extra + shape.text)
    assert site.text == (text if shape.text else None)
    assert (None if site.valid_text is None else site.valid_text.tolist()) == ([shape.valid] if shape.valid else None)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_visual_tokens_move_the_rows_of_the_visual_span(name, grid):
    shape, (model, inputs) = zoo.SHAPES[name], zoo.build(name, grid)
    role = (
        "self" if shape.visual == "list" else "joint" if shape.text else "self"
    )  # Z-Image mixes tokens before it joins them
    site, v = first_call(model, inputs, role)
    _, moved = first_call(model, changed(name, inputs, grid), role)
    assert moved_rows(v, moved) == list(range(*site.visual))
    t, h, w = (size - back for size, back in zip(grid, (1, 2, 3), strict=True))
    _, moved = first_call(model, changed(name, inputs, grid, (t, h, w)), role)
    assert moved_rows(v, moved) == [site.visual.start + (t * grid[1] + h) * grid[2] + w]


@pytest.mark.parametrize("name", ["kontext", "flux2_references", "qwen_edit"])
def test_reference_tokens_move_the_rows_of_the_extra_span(name):
    grid = (1, 45, 53)
    model, inputs = zoo.build(name, grid)
    site, v = first_call(model, inputs)
    inputs["hidden_states"] = inputs["hidden_states"].clone()
    inputs["hidden_states"][:, 45 * 53 :] += 3
    _, moved = first_call(model, inputs)
    assert moved_rows(v, moved) == list(range(*site.extra[0]))


@pytest.mark.parametrize("name", ["zimage", "zimage_padded"])
def test_captions_move_the_rows_of_the_text_span(name):
    model, inputs = zoo.build(name, (1, 13, 31))
    site, v = first_call(model, inputs, "joint")
    inputs["cap_feats"] = [x + 3 for x in inputs["cap_feats"]]
    _, moved = first_call(model, inputs, "joint")
    assert moved_rows(v, moved) == list(range(*site.text))


@pytest.mark.parametrize("name", ["wan", "wan_vace", "skyreels", "hunyuan", "mochi", "pixart"])
def test_latents_that_no_patch_divides_keep_whole_tokens(name):
    shape, (model, inputs) = zoo.SHAPES[name], zoo.build(name)
    for key in ("hidden_states", "control_hidden_states"):
        if key in inputs:
            x = inputs[key]
            inputs[key] = torch.randn(*x.shape[:-2], 45, 53)
    site, v = first_call(model, inputs)
    assert site.grid == (shape.grid[0], 22, 26) and site.tokens == len(v)


def test_ragged_captions_have_lengths_and_ragged_pictures_no_grid():
    from zoo_images import _zimage

    torch.manual_seed(0)
    model, inputs = _zimage((1, 5, 7), (70, 20))
    site, v = first_call(model.eval(), inputs, "joint")
    assert site.text == Span(64, 160) and site.valid_text.tolist() == [96, 32] and len(v) == 160
    inputs["x"][1] = inputs["x"][1][..., :-2]
    handle = accelerate(model, First())
    with torch.no_grad():
        model(**inputs)
    assert "the pictures of the batch have different sizes" in str(handle.summary())
