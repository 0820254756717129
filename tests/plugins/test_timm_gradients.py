"""Vision transformers in training: gradients are those of the masked plain model, checkpointed or not, in lower precision too."""

import copy
import pickle

import pytest
import torch
from grid_oracle import window_mask
from host_oracle import masked_attention, sequence_mask
from timm_families import FAMILIES, build, picture

import foveal
from foveal.plugins.accelerate import AccelerateError

GRID = (7, 9)


def gradients(model, *pictures):
    """Every forward first, then the backward passes, the last picture first."""
    model.zero_grad(set_to_none=True)
    for loss in reversed([model(x).square().sum() for x in pictures]):
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def masks(prefix, *grids):
    return {h * w + prefix: sequence_mask(window_mask((h, w), 3), h * w + prefix, prefix) for h, w in grids}


def assert_same(got, want, tolerance=1e-8):
    assert got.keys() == want.keys() and got
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["vit", "deit-distilled", "dinov3", "eva02", "siglip", "naflex"])
def test_gradients_are_those_of_the_masked_model(family, checkpointing):
    prefix = FAMILIES[family][1]
    model, x = build(family, GRID).train(), picture(GRID)
    with masked_attention(masks(prefix, GRID)):
        want = gradients(model, x)
    model.set_grad_checkpointing(checkpointing)
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        assert_same(gradients(model, x), want)
        assert {row.calls for row in handle.record.layers if row.left_alone is None} == {1}


@pytest.mark.parametrize("grids", [((7, 9), (5, 6)), ((7, 9), (9, 7))], ids=["two-sizes", "same-count-other-shape"])
def test_checkpointed_crops_of_several_sizes_keep_their_grids(grids):
    """Two forward passes, then two backward passes: each recomputes with the grid of its own picture."""
    model = build("dinov3", GRID).train()
    model.set_grad_checkpointing(True)
    crops = [picture(grid) for grid in grids]
    want = {}
    for grid, x in zip(grids, crops, strict=True):
        with masked_attention(masks(5, grid)):
            for name, value in gradients(model, x).items():
                want[name] = want.get(name, 0) + value
    with foveal.accelerate(model, "neighborhood", window=3):
        assert_same(gradients(model, *crops), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_autocast_trains_close_to_the_masked_model(family, dtype):
    prefix = FAMILIES[family][1]
    model, x = build(family, GRID, dtype=torch.float32, qk_norm=True).train(), picture(GRID, dtype=torch.float32)
    with masked_attention(masks(prefix, GRID)), torch.autocast("cpu", dtype):
        want = model(x)
    with foveal.accelerate(model, "neighborhood", window=3) as handle, torch.autocast("cpu", dtype):
        got = model(x)
        assert handle.record.layers[0].dense_calls == 0
    got.float().sum().backward()
    assert got.dtype == want.dtype
    assert (got - want).norm() / want.norm() < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_attention_dropout_runs_dense_in_training_and_is_named():
    model, x = build("vit", GRID, attn_drop_rate=0.5).train(), picture(GRID)
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        model(x)
        assert "dense, attention dropout: 2 calls" in str(handle.summary())
        handle.reset()
        model.eval()(x)
        assert handle.record.layers[0].dense_calls == 0


def test_patch_dropout_runs_dense_in_training_and_is_named():
    model, x = build("vit", GRID, patch_drop_rate=0.5).train(), picture(GRID)
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        model(x)
        assert handle.record.layers[0].dense_calls == 1 and "patch dropout" in str(handle.summary())


@torch.no_grad()
def test_a_mask_given_to_the_model_runs_dense_and_is_named():
    model, x = build("vit", GRID), picture(GRID)
    n = GRID[0] * GRID[1] + 1
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    plain = model(x, attn_mask=mask)
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        assert torch.equal(model(x, attn_mask=mask), plain)
        assert "an attention mask" in str(handle.summary())


def test_torchscript_and_fx_are_refused_in_one_sentence():
    model, x = build("vit", GRID, dtype=torch.float32), picture(GRID, dtype=torch.float32)
    with foveal.accelerate(model, "neighborhood", window=3):
        with pytest.raises(AccelerateError, match="cannot become TorchScript"):
            torch.jit.script(model)
        with pytest.raises(AccelerateError, match="cannot become TorchScript"):
            torch.jit.trace(model, x)
        with pytest.raises(AccelerateError, match=r"trac|fx"):
            torch.fx.symbolic_trace(model)


def test_copies_train_without_the_method():
    model, x = build("vit", GRID), picture(GRID)
    want = gradients(model, x)
    with foveal.accelerate(model, "neighborhood", window=3):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(gradients(twin, x), want, 0)
