"""Models are recognised by what they show, not by what they are called; what they do not show is named."""

import dataclasses
import inspect

import diffusers as D
import pytest
import torch
import zoo
from fakes import Spy
from tiny import noise, run

from foveal.plugins.accelerate import AccelerateError, accelerate
from foveal.plugins.diffusers_host.families import FAMILIES, family_of, recognise
from foveal.plugins.diffusers_host.roles import roles_of
from foveal.plugins.diffusers_host.structure import parameters_of, structure_of

pytestmark = pytest.mark.filterwarnings("ignore")
ZOO = [*zoo.REQUIRED, *zoo.OTHERS]
ONE_EACH = {
    "Flux": "flux", "Qwen-Image": "qwen", "Z-Image": "zimage", "SD3": "sd3", "PixArt and Sana": "pixart", "Wan": "wan",
    "Cosmos": "cosmos", "CogVideoX": "cogvideox", "Mochi": "mochi", "LTX": "ltx", "HunyuanVideo": "hunyuan", "a UNet": "sd_unet",
}  # fmt: skip


def subclass(kind):
    return type("Mine", (kind,), {})


def renamed_copy(kind):
    """A class with another name and the same body, not a subclass: what a fork of the source file gives."""
    body = {k: v for k, v in kind.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type("Fork", kind.__bases__, body)


def passing_on(kind):
    """A subclass whose forward hides its arguments."""
    return type("Passing", (kind,), {"forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs)})


def sites(model, inputs):
    spy = Spy()
    with accelerate(model, spy):
        out = run(model, inputs)
    return [(s.name, s.role, s.grid, s.visual, s.text, s.extra) for s, _ in spy.seen], out


@pytest.mark.parametrize("change", [subclass, renamed_copy, passing_on], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ZOO)
def test_another_name_gives_the_same_layout(name, change):
    model, inputs = zoo.build(name)
    expected, plain = sites(model, inputs)
    assert expected or name == "sana"
    family = recognise(model).family
    model.__class__ = change(type(model))
    assert recognise(model).family is family is not None
    found, out = sites(model, inputs)
    assert found == expected and torch.equal(out, plain)


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_fits_one_family_without_its_name(name):
    structure = structure_of(zoo.build(name)[0])
    assert sum(not family.missing(structure) for family in FAMILIES) == 1


def without(structure, family, mark):
    """The structure without one mark of its family."""
    if mark == "layers":
        return dataclasses.replace(
            structure, layers=tuple(n.replace("attn", "mix").replace("attention", "mix") for n in structure.layers)
        )
    kind = "forward" if mark in family.forward else "config"
    return dataclasses.replace(structure, **{kind: getattr(structure, kind) - {mark}})


MARKS = [(f.name, mark) for f in FAMILIES for mark in (*f.forward, *f.config, "layers")]


@pytest.mark.parametrize(("name", "mark"), MARKS, ids=lambda x: x)
def test_every_missing_mark_is_refused_by_sentence(name, mark):
    structure = structure_of(zoo.build(ONE_EACH[name])[0])
    family = family_of(structure).family
    assert family.name == name
    known = family_of(without(structure, family, mark))
    assert known.family is None
    what = {"layers": "it has no attention layers named like "}.get(
        mark, f"its forward takes no {mark}" if mark in family.forward else f"its config has no {mark}"
    )
    assert known.reason.startswith(
        f"the token grid of {structure.name} is unknown: it is built like {name}, but {what}"
    )
    assert "\\" not in known.reason and "Error" not in known.reason


@pytest.mark.parametrize("name", sorted(ONE_EACH.values()))
def test_a_lookalike_runs_dense_and_the_summary_says_why(name):
    model, inputs = zoo.build(name)
    plain, kind = run(model, inputs), type(model)
    lacks = recognise(model).family.forward[-1]
    shown = [p for p in inspect.signature(kind.forward).parameters.values() if p.name != lacks]

    def forward(self, *args, **kwargs):
        return kind.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.Signature(shown)
    model.__class__ = type("Lookalike", (kind,), {"forward": forward})
    handle = accelerate(model, "grat", group=(1, 2, 2))
    assert torch.equal(run(model, inputs), plain)
    (why,) = handle.record.ran_dense_why()
    assert f"its forward takes no {lacks}" in why["reason"] and why["count"] > 0
    assert str(handle.summary()).count(why["reason"]) == 1


def test_a_model_of_no_family_runs_dense_and_the_summary_says_so():
    model = D.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 6, 16),
        "timestep": torch.tensor([0.5]),
    }
    plain = run(model, inputs)
    handle = accelerate(model, "grat", group=(1, 2, 2))
    assert torch.equal(run(model, inputs), plain)
    (why,) = handle.record.ran_dense_why()
    assert why["reason"].startswith("the token grid of AuraFlowTransformer2DModel is unknown: it is built like ")


def test_what_does_not_denoise_is_refused():
    vae = D.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    with pytest.raises(AccelerateError, match="no attention layers of the roles self, joint; it has: unknown"):
        accelerate(vae, "dense")


def test_two_families_at_once_are_decided_by_the_names_of_the_base_classes():
    wan, cosmos = (structure_of(zoo.build(name)[0]) for name in ("wan", "cosmos"))
    both = {k: getattr(wan, k) | getattr(cosmos, k) for k in ("forward", "config")}
    both = dataclasses.replace(wan, **both, layers=wan.layers + cosmos.layers)
    assert family_of(both).family.name == "Wan"
    assert family_of(dataclasses.replace(both, bases=("Mine", "CosmosTransformer3DModel"))).family.name == "Cosmos"
    undecided = family_of(dataclasses.replace(both, bases=("Mine",)))
    assert undecided.family is None and "it is built like Wan and Cosmos at once" in undecided.reason


# ---- arguments
class Base(torch.nn.Module):
    def forward(self, x, time, *, scale=2, **more):
        return x


class Middle(Base):
    def forward(self, x, *args, flag=True, **kwargs):
        return super().forward(x, *args, **kwargs)


class Open(torch.nn.Module):
    def forward(self, *args, **kwargs):
        return args


@pytest.mark.parametrize(
    ("kind", "names"),
    [(Base, "x time scale"), (Middle, "x flag time scale"), (Open, "")],
    ids=["explicit", "partly", "hidden"],
)
def test_arguments_behind_star_args_are_those_of_the_base_classes(kind, names):
    assert [p.name for p in parameters_of(kind)] == names.split()


# ---- roles
EXPECTED_ROLES = {
    "wan": {"self": 2, "cross": 2}, "wan_vace": {"self": 6, "cross": 6}, "flux": {"joint": 4}, "flux2": {"joint": 4},
    "hunyuan": {"joint": 4, "text": 1}, "hunyuan15": {"joint": 2, "text": 1}, "cogvideox": {"joint": 2}, "mochi": {"joint": 2},
    "ltx": {"self": 2, "cross": 2}, "ltx2": {"self": 2, "cross": 2, "audio": 4, "av_cross": 4}, "sd3": {"joint": 2},
    "sd35": {"joint": 2, "self": 1}, "qwen": {"joint": 2}, "zimage": {"joint": 2, "self": 1, "text": 1},
    "pixart": {"self": 2, "cross": 2}, "sana": {"self": 2, "cross": 2}, "cosmos": {"self": 2, "cross": 2},
    "sd_unet": {"self": 7, "cross": 7}, "sdxl_unet": {"self": 8, "cross": 8}, "motion_unet": {"self": 4, "cross": 4, "temporal": 14},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EXPECTED_ROLES))
def test_roles_of_every_layer(name):
    roles = list(roles_of(zoo.build(name)[0]).values())
    assert {role: roles.count(role) for role in set(roles)} == EXPECTED_ROLES[name]


def test_the_module_overrules_the_name_where_it_says_what_it_attends():
    model = D.UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, in_channels=4, out_channels=4, cross_attention_dim=16, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, only_cross_attention=(True, False), mid_block_type=None,
    )  # fmt: skip
    roles = roles_of(model)
    assert {role for name, role in roles.items() if name.startswith("down_blocks.0.")} == {"cross"}
