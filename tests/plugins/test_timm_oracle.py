"""Laws of acceleration in vision transformers: dense is the plain model, sparse is the plain model with a mask, removal is exact."""

import copy
import dataclasses

import pytest
import torch
from grid_oracle import group_mask, window_mask
from host_oracle import masked_attention, sequence_mask
from timm_families import FAMILIES, GRIDS, build, fingerprint, picture

import foveal
from foveal.plugins.method import Method
from foveal.plugins.site import MethodError

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def masked(model, x, grid, prefix, mask):
    n = grid[0] * grid[1] + prefix
    with masked_attention({n: sequence_mask(mask, n, prefix)}) as seen:
        out = model(x)
    assert seen == {n}
    return out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dense_equals_the_plain_model_and_removal_restores_every_bit(family):
    model, x = build(family, dtype=torch.float32), picture(dtype=torch.float32)
    before, plain = fingerprint(model), model(x)
    with foveal.accelerate(model, "dense") as handle:
        assert torch.equal(model(x), plain)
        assert handle.record.ran_dense_why()[0]["count"] == len(handle.still_bound()) > 0
    assert torch.equal(model(x), plain)
    assert fingerprint(model) == before


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sparse_equals_the_plain_model_with_a_mask(family):
    """RoPE, q norms, prefix tokens and token order are all in this one equality."""
    grid, prefix = (13, 17), FAMILIES[family][1]
    model, x = build(family, grid), picture(grid)
    want = masked(model, x, grid, prefix, window_mask(grid, (5, 7)))
    plain = model(x)
    with foveal.accelerate(model, "neighborhood", window=(5, 7)) as handle:
        torch.testing.assert_close(model(x), want, **CLOSE)
        assert not handle.record.ran_dense_why() or handle.record.ran_dense_why()[0]["count"] == 0
    assert (plain - want).abs().max() > 1e-4  # the mask matters


@pytest.mark.parametrize("method", ["grat", "neighborhood-strided", "neighborhood-dilated"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@torch.no_grad()
def test_every_static_method_and_grid_equals_its_mask(method, grid):
    model, x = build("dinov3", grid, depth=1), picture(grid, batch=1)
    if method == "grat":
        knobs, mask = {"group": (1, 4, 4), "b": 1}, group_mask(grid, (4, 4), "B", 1)
    elif method == "neighborhood-strided":
        knobs, mask = {"window": 6, "stride": 3}, window_mask(grid, 6, 3)
    else:
        knobs, mask = {"window": 3, "dilation": 2}, window_mask(grid, 3, 1, 2)
    want = masked(model, x, grid, 5, mask)
    with foveal.accelerate(model, method.split("-")[0], **knobs) as handle:
        torch.testing.assert_close(model(x), want, **CLOSE)
        assert handle.record.layers[0].dense_calls == int(mask.all())  # a plan of all pairs is left to dense attention


@torch.no_grad()
def test_a_window_over_everything_is_dense():
    grid = (13, 17)
    model, x = build("dinov3", grid), picture(grid)
    plain = model(x)
    with foveal.accelerate(model, "neighborhood", window=-1) as handle:
        torch.testing.assert_close(model(x), plain, **CLOSE)
        assert handle.record.density() == 1


@torch.no_grad()
def test_prefix_tokens_see_all_and_are_seen_by_all():
    """One block, a window of 3: what a patch and the prefix know of a far corner."""
    grid, prefix = (9, 9), 5
    model, x = build("dinov2-registers", grid, depth=1), picture(grid, batch=1)
    changed = x.clone()
    changed[..., -8:, -8:] += 1  # the last patch
    with foveal.accelerate(model, "neighborhood", window=3):
        moved = (model.forward_features(x) - model.forward_features(changed)).abs().amax(-1)[0]
        tokens = model.forward_features(x)
        model.reg_token.data[:, 0] = torch.arange(32.0)
        seen = (model.forward_features(x) - tokens).abs().amax(-1)[0]
    assert (moved[:prefix] > 1e-6).all()  # every prefix token sees the corner
    patches = moved[prefix:].view(grid) > 1e-9
    assert patches.sum() == 4 and patches[-2:, -2:].all()  # of the patches only its window does
    assert (seen > 1e-6).all()  # and every token sees a register


@torch.no_grad()
def test_one_model_serves_pictures_of_any_size():
    model = build("dinov3", (8, 8), depth=1)
    with foveal.accelerate(model, "neighborhood", window=5) as handle:
        got = {grid: model(picture(grid, batch=1)) for grid in ((13, 17), (17, 13), (31, 45))}
        assert handle.record.layers[0].calls == 3 and handle.record.layers[0].dense_calls == 0
    for grid, out in got.items():
        want = masked(model, picture(grid, batch=1), grid, 5, window_mask(grid, 5))
        torch.testing.assert_close(out, want, **CLOSE)


@torch.no_grad()
def test_a_picture_too_small_for_the_window_is_refused_by_its_grid_and_larger_ones_go_on():
    model = build("vit", (31, 45), depth=1)
    with foveal.accelerate(model, "neighborhood", window=15) as handle:
        with pytest.raises(MethodError, match="8x8"):
            model(picture((8, 8), batch=1))
        model(picture((31, 45), batch=1))
        assert handle.record.layers[0].calls == 1 and handle.record.layers[0].dense_calls == 0


@torch.no_grad()
def test_intermediate_features_come_in_raster_order():
    grid = (13, 17)
    model, x = build("dinov3", grid), picture(grid, batch=1)
    n = grid[0] * grid[1] + 5
    with masked_attention({n: sequence_mask(group_mask(grid, (4, 4)), n, 5)}):
        want = model.forward_intermediates(x, intermediates_only=True)
    with foveal.accelerate(model, "grat", group=(1, 4, 4)):
        for a, b in zip(model.forward_intermediates(x, intermediates_only=True), want, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_copies_and_state_dicts_know_nothing_of_it():
    model, x = build(dtype=torch.float32), picture(dtype=torch.float32)
    plain, names = model(x), list(model.state_dict())
    with foveal.accelerate(model, "neighborhood", window=5) as handle:
        twin = copy.deepcopy(model)
        assert list(model.state_dict()) == names
        calls = handle.record.layers[0].calls
        assert torch.equal(twin(x), plain) and foveal.handle_of(twin) is None
        assert handle.record.layers[0].calls == calls and handle.still_bound()
        model.load_state_dict(twin.state_dict())
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain) and torch.equal(twin(x), plain)


@torch.no_grad()
def test_accelerating_again_replaces_the_first_and_keeps_its_originals():
    model, x = build(dtype=torch.float32), picture(dtype=torch.float32)
    plain, before = model(x), fingerprint(model)
    first = foveal.accelerate(model, "neighborhood", window=5)
    second = foveal.accelerate(model, "grat", group=(1, 4, 4))
    assert not first.still_bound() and not first.is_active() and second.is_active()
    assert foveal.handle_of(model) is second
    second.remove()
    second.remove()
    assert torch.equal(model(x), plain) and fingerprint(model) == before and foveal.handle_of(model) is None


@torch.no_grad()
def test_settings_do_the_same_again():
    model, x = build(), picture()
    with foveal.accelerate(model, "neighborhood", window=5, layers=[-1]) as handle:
        want, settings = model(x), handle.to_json()
        assert handle.still_bound() == ["blocks.1.attn"]
        assert [row["calls"] for row in handle.record.table()] == [1]
        handle.reset()
        assert handle.record.layers[0].calls == 0
    with type(handle).from_settings(model, settings) as again:
        assert torch.equal(model(x), want) and again.settings == handle.settings


@torch.no_grad()
def test_a_vision_transformer_inside_another_module_is_found():
    inner, x = build(), picture()
    outer = torch.nn.Sequential(torch.nn.Identity(), inner)
    before = fingerprint(outer)
    with foveal.accelerate(outer, "neighborhood", window=5) as handle:
        assert handle.still_bound() == ["1.blocks.0.attn", "1.blocks.1.attn"]
        outer(x)
        assert handle.record.density() < 0.2
    assert fingerprint(outer) == before


@torch.no_grad()
def test_a_replaced_attention_is_noticed_and_left_in_place():
    model, other = build(), build(seed=1)
    handle = foveal.accelerate(model, "neighborhood", window=5)
    mine = other.blocks[0].attn
    model.blocks[0].attn = mine
    with pytest.warns(UserWarning, match="1 of 2 layers"):
        assert not handle.is_active()
    handle.remove()
    assert model.blocks[0].attn is mine and type(model.blocks[1].attn) is type(mine)


@torch.no_grad()
def test_stepwise_softmax_keeps_its_bits_when_dense():
    model, x = build(dtype=torch.float32), picture(dtype=torch.float32)
    for block in model.blocks:
        block.attn.fused_attn = False
    plain = model(x)
    with foveal.accelerate(model, "dense"):
        assert torch.equal(model(x), plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembering(Method):
    """Notes what its state knows of earlier pictures."""

    name = "remembering"

    def plan(self, q, k, v, site, state):
        earlier.append(len(list(state)))
        state["picture"] = q
        return None


earlier = []


@torch.no_grad()
def test_no_picture_sees_the_state_of_another():
    model = build(depth=1)
    earlier.clear()
    with foveal.accelerate(model, Remembering()):
        model(picture())
        model(picture(seed=1))
    assert earlier == [0, 0]


# ---- NaFlex
def padded_batch(grids, width):
    """Pictures of several grids as patches with coordinates and validity, padded to the longest."""
    n = max(h * w for h, w in grids)
    patches, coord = (
        torch.zeros(len(grids), n, width, dtype=torch.float64),
        torch.zeros(len(grids), n, 2, dtype=torch.long),
    )
    valid = torch.zeros(len(grids), n, dtype=torch.bool)
    make = torch.Generator().manual_seed(0)
    for i, (h, w) in enumerate(grids):
        patches[i, : h * w] = torch.randn(h * w, width, generator=make, dtype=torch.float64)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        coord[i, : h * w] = torch.stack([rows.flatten(), columns.flatten()], -1)
        valid[i, : h * w] = True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


@pytest.mark.parametrize("grids", [((7, 9), (7, 9)), ((7, 9), (5, 6), (9, 7))], ids=["one-grid", "three-grids"])
@torch.no_grad()
def test_naflex_batches_of_several_grids_equal_their_masks(grids):
    """Every sample alone, with the mask of its own grid, is what the padded batch must give."""
    model, batch = build("naflex", (7, 9)), padded_batch(grids, 3 * 8 * 8)
    alone = []
    for i, (h, w) in enumerate(grids):
        one = {key: value[i : i + 1, : h * w] for key, value in batch.items()}
        mask = sequence_mask(window_mask((h, w), 3), h * w + 4, 4)
        alone.append(model({**one, "attn_mask": mask[None, None]}))
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        torch.testing.assert_close(model(batch), torch.cat(alone), **CLOSE)
        assert handle.record.layers[0].dense_calls == 0


@torch.no_grad()
def test_scattered_naflex_patches_run_dense_and_are_named():
    model, batch = build("naflex", (7, 9)), padded_batch(((7, 9),), 3 * 8 * 8)
    batch = {key: value.flip(1) for key, value in batch.items()}
    plain = model(batch)
    with foveal.accelerate(model, "neighborhood", window=3) as handle:
        torch.testing.assert_close(model(batch), plain, **CLOSE)
        assert handle.record.layers[0].dense_calls == 1 and "reading order" in str(handle.summary())
