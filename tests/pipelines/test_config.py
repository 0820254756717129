"""A config is checked before anything runs; every mistake is one sentence with the key's path."""

import pytest

from foveal.pipelines.config import ConfigError, build, dump, fingerprint, load, shipped_folder

GOOD = {"model": "world-nano", "methods": [{"name": "grat", "knobs": {"group": [1, 8, 8]}}], "prompts": ["a"]}


def sentence(data, overrides=()):
    with pytest.raises(ConfigError) as caught:
        build(data, overrides)
    text = str(caught.value)
    assert "\n" not in text and text.rstrip().endswith((".", "?"))
    return text


def test_a_good_config_has_its_defaults():
    study = build(GOOD).studies[0]
    assert study.seeds == [0] and study.sampler.steps is None and study.methods[0].knobs == {"group": [1, 8, 8]}


@pytest.mark.parametrize(
    ("change", "path", "near"),
    [
        ({"promts": []}, "'promts'", "'prompts'"),
        ({"sampler": {"stps": 3}}, "'sampler.stps'", "'sampler.steps'"),
        ({"methods": [{"nme": "grat"}]}, "'methods[0].nme'", "'methods[0].name'"),
        ({"steps": 3}, "'steps'", "'sampler.steps'"),
        ({"_target_": "os.system"}, "'_target_'", "keys here"),
    ],
)
def test_an_unknown_key_names_its_path_and_the_nearest(change, path, near):
    text = sentence({**GOOD, **change})
    assert path in text and near in text


def test_an_unknown_key_inside_a_study_has_the_whole_path():
    assert "'studies[1].methods[0].nob'" in sentence(
        {"studies": [GOOD, {**GOOD, "methods": [{"name": "x", "nob": 1}]}]}
    )


@pytest.mark.parametrize(
    ("change", "path", "kind"),
    [
        ({"sampler": {"steps": "many"}}, "sampler.steps", "int"),
        ({"seeds": [0, "x"]}, "seeds[1]", "int"),
        ({"methods": ["grat"]}, "methods[0]", "name, label, knobs"),
        ({"model": [1]}, "model", "str"),
    ],
)
def test_a_wrong_type_names_its_path_and_what_is_taken(change, path, kind):
    text = sentence({**GOOD, **change})
    assert text.startswith(path) and kind in text


@pytest.mark.parametrize("key", ["model", "methods", "prompts"])
def test_a_missing_key_is_named(key):
    assert f"{key} is missing" in sentence({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": []}, {"seeds": []}, {"seeds": [1, 1]}, {"seeds": [-1]}, {"methods": []}, {"densities": [0.0]},
        {"sampler": {"steps": 0}}, {"dtype": "fp8"}, {"device": "tpu"}, {"rounds": -1}, {"batch": 0}, {"frames": 0},
        {"on_missing": "ignore"}, {"id": "../up"},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_run_is_refused(change):
    sentence({**GOOD, **change})


def test_overrides_reach_every_place():
    study = build(GOOD, ["sampler.steps=4", "seeds=[1,2]", "methods.0.knobs.b=2", "methods[0].label=wide"]).studies[0]
    assert (study.sampler.steps, study.seeds, study.methods[0].knobs["b"], study.methods[0].label) == (
        4,
        [1, 2],
        2,
        "wide",
    )


@pytest.mark.parametrize("text", ["steps", "=3", "methods.7.name=x", "a=[1"])
def test_a_bad_override_is_named(text):
    assert text in sentence(GOOD, [text])


def test_interpolation_is_refused():
    assert "plain values" in sentence({**GOOD, "model": "${oc.env:HOME}"})


def test_the_fingerprint_ignores_the_output_folder_only():
    one, two = build(GOOD, ["output=a"]).resolved, build(GOOD, ["output=b"]).resolved
    assert fingerprint(one) == fingerprint(two) != fingerprint(build(GOOD, ["seeds=[1]"]).resolved)


def test_a_dumped_config_loads_to_the_same_config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump(build(GOOD).resolved))
    assert load(path).resolved == build(GOOD).resolved


@pytest.mark.parametrize("path", sorted(shipped_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    assert load(path).studies and load(path.stem).studies


def test_a_missing_file_suggests_a_shipped_config():
    with pytest.raises(ConfigError, match="demo"):
        load("dmeo")


def test_broken_yaml_is_one_sentence(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1, 2")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load(path)
