"""Presets are valid, block-sparse on their grid and honest: what files and pages state is what the plans and the data say."""

import re

import pytest
import torch

import foveal
from foveal.kernels.block_sparse.tiles import fill
from foveal.pipelines import presets
from foveal.pipelines.config import ConfigError, load
from foveal.pipelines.presets import Figure, Gain, case_of, eff_of, names, plan_of, preset_rows, share_of, study_of
from foveal.plugins.method import make


@pytest.fixture(scope="module")
def rows():
    return preset_rows()


def plans(name):
    return [plan_of(make(m.name, **m.knobs), case_of(name)) for m in study_of(name).methods]


def text_of(name):
    return (presets.folder() / f"{name}.yaml").read_text()


# ---- every preset
@pytest.mark.parametrize("name", names())
def test_a_preset_is_a_config_found_by_name(name):
    study = load(f"presets/{name}", ["model=/some/where"]).studies[0]
    assert study.model == "/some/where" and study.sampler.steps
    chosen = study.methods[0]
    assert foveal.preset(name) == {"method": chosen.name, **chosen.knobs}
    assert f"presets/{name} model=" in text_of(name) and f'preset("{name}")' in text_of(name)


@pytest.mark.parametrize("name", names())
def test_every_visited_block_is_full_and_fills_the_kernels_tiles(name):
    for plan in plans(name):
        assert torch.equal(plan.n_full, plan.count) and not plan.has_pair_masks
        assert fill(plan.max_q_len, 128) > 0.87


@pytest.mark.parametrize("name", names())
def test_the_file_states_grid_setting_and_density_of_its_plans(name):
    stated = re.findall(
        r"^# (?:neighbourhood|GRAT): (.+?) \(\d+ tokens\).* Density (\d\.\d{4})\.$", text_of(name), re.M
    )
    found = [(p.label.removeprefix("neighborhood ").removeprefix("grat-"), f"{p.density:.4f}") for p in plans(name)]
    assert stated == found
    grid = " x ".join(str(g) for g in case_of(name).grid if g > 1)
    assert f": {grid} tokens" in text_of(name).splitlines()[0]


@pytest.mark.parametrize("name", names())
def test_the_grid_is_the_models_at_that_size(name):
    study, (t, h, w) = study_of(name), case_of(name).grid
    assert study.height / h == study.width / w and study.height / h in (8, 16, 32)
    assert t == 1 if study.frames is None else (study.frames - 1) / (t - 1) in (4, 6, 8)


@pytest.mark.parametrize(
    ("name", "dense", "first_layer"),
    [
        ("flux-4096", 9, False),
        ("hunyuan-720p", 15, False),
        ("cosmos", 12, False),
        ("wan-1.3b-480p", 10, True),
        ("mochi", 13, True),
    ],
)
def test_dense_steps_and_layers_are_those_of_the_papers(name, dense, first_layer):
    study = study_of(name)
    for method in (make(m.name, **m.knobs) for m in study.methods):
        assert method.first_sparse_step(study.sampler.steps) == dense
        assert method.dense_layers == ((0,) if first_layer else ())


def test_methods_of_one_preset_have_the_same_dense_steps():
    for name in names():
        knobs = [m.knobs for m in study_of(name).methods]
        assert len({(k["dense_steps"], tuple(k.get("dense_layers", ()))) for k in knobs}) == 1, name


def test_every_preset_has_its_facts():
    assert sorted(presets.facts()["cases"]) == names()


# ---- on a model
def test_a_preset_accelerates_a_model_at_the_stated_density():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=1, attention_head_dim=16, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), in_channels=4,
    ).eval()  # fmt: skip
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(64.0), torch.arange(64.0))
    with foveal.accelerate(model, **foveal.preset("flux-1024")) as handle, torch.inference_mode():
        model(
            hidden_states=torch.randn(1, 4096, 4), encoder_hidden_states=torch.randn(1, 512, 8), img_ids=ids,
            pooled_projections=torch.randn(1, 8), timestep=torch.ones(1), txt_ids=torch.zeros(512, 3),
        )  # fmt: skip
        assert handle.record.density() == pytest.approx(plans("flux-1024")[0].density)


def test_a_unet_preset_leaves_small_levels_dense():
    from diffusers import UNet2DConditionModel

    cross, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(8, 16), down_block_types=(cross, cross), up_block_types=(up, up), layers_per_block=1,
        attention_head_dim=1, cross_attention_dim=8, norm_num_groups=4,
    ).eval()  # fmt: skip
    with foveal.accelerate(unet, **foveal.preset("sd1.5")) as handle, torch.inference_mode():
        unet(torch.randn(1, 4, 64, 64), 1, torch.randn(1, 3, 8))
        found = {layer.name: layer.dense_calls for layer in handle.record.layers}
    assert {name: dense == 0 for name, dense in found.items()} == {
        name: name.startswith(("down_blocks.0", "up_blocks.1")) for name in found
    }


# ---- expectations
def gain(share=0.5, density=0.25, eff=1.0, part=1.0):
    return Gain(density, Figure(share, ""), Figure(eff, ""), part)


def test_the_gain_is_the_stated_formula():
    assert gain().step == pytest.approx(1 / (0.5 + 0.125)) and gain().run == pytest.approx(gain().step)
    assert gain(part=0.5).run == pytest.approx(1 / (1 - 0.5 * 0.5 * 0.75))
    assert gain(density=0.5, eff=0.5).step == pytest.approx(1), "as slow as dense"
    assert gain(density=0).step == pytest.approx(gain().limit) == pytest.approx(2)
    assert gain(part=0).run == 1


def test_no_expectation_passes_what_free_attention_gives(rows):
    for r in rows:
        assert 1 < r["run_gain"] <= r["step_gain"] < r["limit"] == pytest.approx(1 / (1 - r["share"]))


def test_presets_that_gain_little_say_so_and_the_others_do_not(rows):
    for r in rows:
        assert r["little"] == ("Little or no gain expected" in text_of(r["name"]))
        assert r["run_gain"] < 1.2 if r["little"] else r["run_gain"] > 1.1, r["name"]
    assert {r["name"] for r in rows if r["little"]} >= {"flux-1024", "sdxl", "sd1.5", "ltx"}


def test_a_share_that_was_not_timed_is_an_upper_figure_and_marked():
    assert share_of("cogvideox").upper and not share_of("wan-1.3b-480p").upper
    assert not share_of("cosmos").measured and "reported by" in share_of("cosmos").source
    assert share_of("wan2.2-a14b") == share_of("wan-14b-720p")
    marked = presets.cells(next(r for r in preset_rows() if r["name"] == "cogvideox"))
    assert marked[4].endswith("†") and marked[6].startswith("at most")


def test_the_speed_of_a_head_dim_is_the_nearest_one_above():
    assert eff_of(40) == eff_of(64) != eff_of(128) == eff_of(256)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("flux-496",), "Did you mean 'flux-4096'"), (("flux-4096", "gratt"), "it has neighborhood, grat")],
    ids=["preset", "method"],
)
def test_what_there_is_not_is_one_sentence(arguments, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        foveal.preset(*arguments)


def test_a_preset_hands_out_any_of_its_methods():
    assert foveal.preset("hunyuan-720p", "grat")["method"] == "grat"
