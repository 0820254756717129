"""Laws of methods as values and of their registry."""

import dataclasses
import json
import sys

import pytest
import torch

from foveal.kernels.block_sparse import BlockPlan
from foveal.plugins.method import Method, make, method_class, methods
from foveal.plugins.methods.dense import Dense
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.site import MethodError, Site, Span, State

BUILT_IN = {"dense": Dense, "grat": GRAT, "neighborhood": Neighborhood}


def site(**knobs):
    return Site(
        **{**dict(role="self", name="x", layer=0, layers=4, grid=(1, 4, 4), visual=Span(0, 16), steps=10), **knobs}
    )


def test_built_in_methods_are_registered_under_their_names():
    found = methods()
    assert {name: found[name] for name in BUILT_IN} == BUILT_IN
    assert all(cls.name == name and cls.summary for name, cls in BUILT_IN.items())


@pytest.mark.parametrize(
    "method",
    [
        Dense(dense_layers=[0, -1]),
        GRAT(group=(3, 5, 8), pattern="X", preset="quality"),
        GRAT(density=0.2, min_tokens=100),
        Neighborhood(window=(-1, 3, 5), stride=(1, 1, 2), causal=(True, False, False), base_grid=(-1, 44, 80)),
    ],
    ids=str,
)
def test_settings_survive_json(method):
    assert make(method.name, **json.loads(json.dumps(method.knobs()))) == method
    assert hash(make(method.name, **method.knobs())) == hash(method)


@pytest.mark.parametrize("word, near", [("neighbourhood", "neighborhood"), ("gratt", "grat"), ("dens", "dense")])
def test_an_unknown_method_suggests_the_nearest(word, near):
    with pytest.raises(MethodError, match=f"no method called '{word}'.*did you mean '{near}'"):
        make(word)


def test_an_unknown_knob_suggests_the_nearest():
    with pytest.raises(MethodError, match=r"grat has no knob 'grup'.*did you mean 'group'"):
        make("grat", grup=3)
    with pytest.raises(MethodError, match=r"neighborhood has no knob 'windows'.*'window'"):
        make("neighborhood", windows=3)


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRAT().b = 2


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(density=0), r"density is 0.*\(0, 1\]"),
        (dict(density=1.5), "density is 1.5"),
        (dict(dense_steps=-1), "dense_steps is -1"),
        (dict(min_tokens=-1), "min_tokens -1"),
        (dict(refresh_every=0), "refresh_every 0"),
    ],
)
@pytest.mark.parametrize("cls", BUILT_IN.values())
def test_bad_common_knobs_are_refused_in_one_sentence(cls, knobs, words):
    with pytest.raises(MethodError, match=words):
        cls(**knobs)


def test_dense_steps_layers_and_short_sequences_stand_aside_with_a_reason():
    method = GRAT(dense_steps=0.25, dense_layers=(0, -1), min_tokens=16)
    assert [method.stands_aside(site(step=s, layer=1)) for s in (0, 2, 3)] == ["dense step", "dense step", None]
    assert [method.stands_aside(site(step=9, layer=i)) for i in range(4)] == ["dense layer", None, None, "dense layer"]
    short = site(step=9, layer=1, grid=(1, 3, 5), visual=Span(0, 15))
    assert method.stands_aside(short) == "fewer tokens than min_tokens"
    assert GRAT(dense_steps=2).stands_aside(site(step=1, steps=None)) == "dense step"


def test_the_label_names_what_differs_from_the_defaults():
    assert GRAT().label == "grat"
    assert GRAT(group=(1, 8, 8), pattern="X").label == "grat group=(1, 8, 8) pattern=X"


def test_presets_differ_and_keep_the_callers_choice():
    assert Neighborhood(window=3, preset="quality").dense_steps == 0.25
    assert Neighborhood(window=3, preset="paper").dense_steps == 0.3
    assert Neighborhood(window=3, preset="paper", dense_steps=1, dense_layers=(2,)).dense_layers == (2,)
    with pytest.raises(MethodError, match="it is one of paper, quality"):
        Neighborhood(window=3, preset="fast")


def test_attend_is_plan_and_kernel():
    q = torch.randn(1, 2, 16, 8)
    out = GRAT(group=2, b=0).attend(q, q, q, site(), State())
    expected = torch.nn.functional.scaled_dot_product_attention(
        *[x.view(1, 2, 2, 2, 2, 2, 8).transpose(3, 4).reshape(1, 2, 4, 4, 8) for x in (q, q, q)]
    )
    expected = expected.view(1, 2, 2, 2, 2, 2, 8).transpose(3, 4).reshape(q.shape)
    assert (out - expected).abs().max() < 1e-5


FOREIGN = """
from dataclasses import dataclass
from typing import ClassVar
from foveal.plugins.method import Method

@dataclass(frozen=True, kw_only=True)
class Stranger(Method):
    name: ClassVar[str] = "stranger"
    summary: ClassVar[str] = "made elsewhere"
    strength: int = 3
"""


def test_methods_of_installed_packages_are_found(tmp_path, monkeypatch):
    (tmp_path / "stranger_pkg.py").write_text(FOREIGN)
    info = tmp_path / "stranger_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[foveal.methods]\nstranger = stranger_pkg:Stranger\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        method = make("stranger", strength=5)
        assert isinstance(method, Method) and method.knobs()["strength"] == 5
        assert "stranger" in methods() and method_class("stranger").summary == "made elsewhere"
        with pytest.raises(MethodError, match="did you mean 'stranger'"):
            make("strangr")
    finally:
        sys.modules.pop("stranger_pkg", None)
    monkeypatch.undo()
    assert "stranger" not in methods()


def test_state_is_counted_and_forgotten():
    state = State()
    state["mask"] = torch.zeros(10, dtype=torch.float32)
    state["note"] = "text"
    assert "mask" in state and state.get("none") is None and state.bytes() == 40 and list(state) == ["mask", "note"]
    state.reset()
    assert state.bytes() == 0 and "mask" not in state


def test_a_method_that_only_plans_is_complete():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(Method):
        def plan(self, q, k, v, here, state):
            n = q.shape[2]
            whole = torch.tensor([0]), torch.tensor([n])
            one = torch.tensor([1])
            return BlockPlan(
                n_queries=n, n_keys=n, q_start=whole[0], q_len=whole[1], kv_start=whole[0], kv_len=whole[1],
                count=one, n_full=one, index=torch.tensor([[0]]),
            )  # fmt: skip

    q = torch.randn(1, 1, 16, 8)
    assert (
        Own().attend(q, q, q, site(), State()) - torch.nn.functional.scaled_dot_product_attention(q, q, q)
    ).abs().max() < 1e-5
