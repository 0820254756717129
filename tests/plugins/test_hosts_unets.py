"""UNets: a grid per level, small levels dense by name, cross-attention and motion modules never touched."""

import pytest
import torch
import zoo
from fakes import Spy
from grid_oracle import group_mask, window_mask
from host_oracle import masked_attention, sequence_mask
from tiny import run

from foveal.plugins.accelerate import accelerate, handle_of
from foveal.plugins.diffusers_host.processors import GRATAttnProcessor, NeighborhoodAttnProcessor

pytestmark = pytest.mark.filterwarnings("ignore")
UNETS = sorted(zoo.UNETS)
LEVELS = {  # levels with attention, by the grid of the first one
    "sd_unet": lambda h, w: [(h, w), (-(-h // 2), -(-w // 2))],
    "sdxl_unet": lambda h, w: [(-(-h // 2), -(-w // 2))],
    "motion_unet": lambda h, w: [(h, w), (-(-h // 2), -(-w // 2))],
}


def reasons(handle):
    return {item["reason"]: item["layers"] for item in handle.record.ran_dense_why()}


@pytest.mark.parametrize("size", [(16, 24), (45, 53), (13, 31)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", UNETS)
def test_every_level_has_its_own_grid(name, size):
    model, inputs = zoo.build(name, (2 if name == "motion_unet" else 1, *size))
    spy = Spy()
    handle = accelerate(model, spy)
    run(model, inputs)
    grids = LEVELS[name](*size)
    assert {site.grid for site, _ in spy.seen} == {(1, *grid) for grid in grids}
    for site, v in spy.seen:
        assert site.visual == (0, site.grid[1] * site.grid[2]) and v.shape[2] == site.tokens and site.role == "self"
    assert len(spy.seen) == len(handle.still_bound())


TEMPLATES = {"grat": GRATAttnProcessor, "neighborhood": NeighborhoodAttnProcessor}
SPARSE = {"grat": ({"group": (1, 4, 4), "b": 1}, group_mask), "neighborhood": ({"window": (1, 5, 5)}, window_mask)}


@pytest.mark.parametrize("method", sorted(SPARSE))
@pytest.mark.parametrize("size", [(16, 24), (21, 27)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", UNETS)
def test_sparse_levels_equal_the_masked_model(name, size, method):
    grid = (2 if name == "motion_unet" else 1, *size)
    model, inputs = zoo.build(name, grid)
    plain, (knobs, make) = run(model, inputs), SPARSE[method]
    grids = [(1, *level) for level in LEVELS[name](*size)]
    masks = {h * w: sequence_mask(make((1, h, w), **knobs), h * w, 0) for _, h, w in grids}
    with masked_attention(masks) as seen:
        expected = run(*zoo.build(name, grid))
    assert seen == set(masks) and not torch.allclose(expected, plain, atol=1e-4)
    with accelerate(model, method, **knobs) as handle:
        sparse = run(model, inputs)
        assert handle.record.density() < 1
    torch.testing.assert_close(sparse, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(run(model, inputs), plain)
    model.set_attn_processor(TEMPLATES[method](**knobs))
    assert torch.equal(run(model, inputs), sparse)
    handle_of(model).remove()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize(("group", "b"), [((1, 16, 16), 1), ((1, 32, 32), 0)], ids=["all-in-reach", "one-group"])
def test_levels_too_small_for_the_groups_run_dense_by_name(group, b):
    model, inputs = zoo.build("sd_unet", (1, 64, 64))
    handle = accelerate(model, "grat", group=group, b=b)
    run(model, inputs)
    ((small, dense),) = reasons(handle).items()
    assert small == "with these settings the method leaves nothing out (level 32x32)"
    assert len(dense) == 4 and set(dense) < set(handle.still_bound())
    assert all(row.mean("density") < 1 for row in handle.record.layers if row.qualified not in dense)
    assert str(handle.summary()).count(small) == 1


@pytest.mark.parametrize("name", UNETS)
def test_full_settings_are_the_plain_unet_to_the_bit(name):
    model, inputs = zoo.build(name)
    plain = run(model, inputs)
    for method, knobs in (("grat", {"group": (1, 4, 4), "b": -1}), ("neighborhood", {"window": -1})):
        handle = accelerate(model, method, **knobs)
        assert torch.equal(run(model, inputs), plain)
        assert any("leaves nothing out" in reason for reason in reasons(handle))


def test_levels_that_the_knobs_do_not_fit_run_dense_by_name():
    model, inputs = zoo.build("sd_unet", (1, 16, 24))
    handle = accelerate(model, "neighborhood", window=(1, 11, 11))
    run(model, inputs)
    (reason,) = reasons(handle)
    assert "window" in reason and reason.endswith("(level 8x12)")
    assert handle.record.density() < 1


def test_levels_below_min_tokens_run_dense_by_name():
    model, inputs = zoo.build("sd_unet", (1, 16, 24))
    handle = accelerate(model, "grat", group=(1, 4, 4), min_tokens=100)
    run(model, inputs)
    assert list(reasons(handle)) == ["fewer tokens than min_tokens (level 8x12)"]


def test_a_knob_that_fits_no_transformer_grid_still_raises():
    model, inputs = zoo.build("wan")
    accelerate(model, "neighborhood", window=(1, 11, 11))
    with pytest.raises(ValueError, match="window"):
        run(model, inputs)


@pytest.mark.parametrize("name", UNETS)
def test_cross_attention_is_never_touched(name):
    model, _ = zoo.build(name)
    before = {n: m.processor for n, m in model.named_modules() if getattr(m, "processor", None) is not None}
    with accelerate(model, Spy()) as handle:
        touched = {n for n, p in before.items() if model.get_submodule(n).processor is not p}
    assert touched == set(handle.record.layers[i].name for i in range(len(touched)))
    assert all(n.endswith("attn1") and "motion_modules" not in n for n in touched) and touched


def test_motion_modules_stay_dense_and_the_summary_says_why():
    model, inputs = zoo.build("motion_unet", (16, 8, 12))
    plain = run(model, inputs)
    handle = accelerate(model, "grat", group=(1, 2, 4), b=0)
    assert not torch.equal(run(model, inputs), plain)
    (why,) = handle.record.ran_dense_why()
    assert "motion modules attend over the few frames of one pixel" in why["reason"]
    assert len(why["layers"]) == 14 and all("motion_modules" in name for name in why["layers"])
    text = str(handle.summary())
    assert text.count(why["reason"]) == 1 and "left alone" in text
    assert {row.role for row in handle.record.layers if row.calls} == {"self"}


def test_motion_modules_can_be_asked_for():
    model, inputs = zoo.build("motion_unet", (16, 8, 12))
    spy = Spy()
    handle = accelerate(model, spy, roles=["temporal"])
    run(model, inputs)
    assert {(site.role, site.grid) for site, _ in spy.seen} == {("temporal", (16, 1, 1))}
    assert not any(row.left_alone for row in handle.record.layers)


def test_chosen_layers_do_not_bring_the_others_into_the_summary():
    model, _ = zoo.build("motion_unet")
    handle = accelerate(model, Spy(), layers=[0])
    assert len(handle.record.layers) == 1
