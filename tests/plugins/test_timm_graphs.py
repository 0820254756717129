"""Compiled vision transformers: whole, compiled first, or block by block; every picture size; trained."""

import copy

import pytest
import torch
from timm_families import build, picture

import foveal

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SIZES = ((7, 9), (9, 7), (7, 9))


def compiled(model, how):
    """-> the callable, accelerated, and its handle"""
    if how == "blocks":
        handle = foveal.accelerate(model, "neighborhood", window=3)
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        return model, handle
    if how == "after":
        handle = foveal.accelerate(model, "neighborhood", window=3)
        return torch.compile(model, backend="aot_eager", fullgraph=True), handle
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    fast(picture(SIZES[0], dtype=torch.float32))
    return fast, foveal.accelerate(fast, "neighborhood", window=3)


@pytest.mark.parametrize("how", ["after", "first", "blocks"])
@torch.no_grad()
def test_compiled_equals_eager_at_every_size(how):
    """Two of the sizes have the same number of patches and another shape."""
    model = build("dinov3", SIZES[0], dtype=torch.float32, depth=1)
    plain = copy.deepcopy(model)
    fast, handle = compiled(copy.deepcopy(model), how)
    foveal.accelerate(model, "neighborhood", window=3)
    for i, size in enumerate(SIZES):
        x = picture(size, dtype=torch.float32)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert handle.record.layers[0].calls == i + 1 and handle.record.layers[0].dense_calls == 0
    handle.remove()
    x = picture(SIZES[0], dtype=torch.float32)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["after", "blocks"])
def test_compiled_gradients_equal_eager_ones_whatever_ran_between(how):
    model = build("dinov3", SIZES[0], dtype=torch.float64, depth=1)
    fast, handle = compiled(copy.deepcopy(model), how)
    trained = getattr(fast, "_orig_mod", fast)
    foveal.accelerate(model, "neighborhood", window=3)
    for run in (model, fast):
        losses = [run(picture(size)).square().sum() for size in SIZES[:2]]
        for loss in losses:  # the second picture's forward lies between the first one's forward and backward
            loss.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert handle.record.layers[0].calls == 2
