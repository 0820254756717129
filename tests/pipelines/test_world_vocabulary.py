"""Laws of the prompt language."""

import itertools

import pytest
import torch

from foveal.pipelines.world.vocabulary import (
    COLUMNS,
    FIELDS,
    N_SLOTS,
    SECOND_OBJECT_SLOTS,
    SLOTS,
    VOCAB,
    PromptError,
    Scene,
    Thing,
    attributes_of,
    describe,
    parse,
    require_objects,
    scenes_of,
    word_ids,
)

PROMPT = "a small red circle moving up-left on a navy striped background"
SCENE = Scene("small", "red", "circle", "up-left", "striped", "navy")
PAIR = PROMPT.replace(" on a", " and a large blue ring standing still on a")
BOTH = Scene("small", "red", "circle", "up-left", "striped", "navy", Thing("large", "blue", "ring", "still"))


def test_word_order_is_the_order_of_the_shipped_weights():
    assert " ".join(VOCAB) == (
        "<null> small large red green blue yellow purple cyan orange white circle square triangle ring cross "
        "still right left down up down-right up-left up-right down-left plain checker striped black gray navy forest"
    )


def test_parse_and_describe_are_inverse_on_every_scene():
    for words in itertools.product(*FIELDS.values()):
        scene = Scene(**dict(zip(FIELDS, words, strict=True)))
        assert parse(describe(scene)) == scene


def test_a_prompt_becomes_its_scene():
    assert parse(PROMPT) == SCENE
    assert describe(SCENE) == PROMPT
    assert parse("a large white ring standing still on a black plain background").motion == "still"
    assert parse(PAIR) == BOTH and describe(BOTH) == PAIR
    assert BOTH.things == (Thing("small", "red", "circle", "up-left"), Thing("large", "blue", "ring", "still"))


def test_parse_and_describe_are_inverse_on_every_second_object():
    for words in itertools.product(*(FIELDS[field] for field in ("size", "colour", "shape", "motion"))):
        if words[1] != "red":
            scene = Scene("small", "red", "cross", "up", "plain", "navy", Thing(*words))
            assert parse(describe(scene)) == scene and scenes_of(attributes_of([scene])) == [scene]


def test_attributes_and_scenes_are_inverse():
    scenes = [SCENE, BOTH, Scene("large", "white", "cross", "still", "plain", "forest")]
    assert scenes_of(attributes_of(scenes)) == scenes
    assert attributes_of([]).shape == (0, COLUMNS)
    assert Scene.from_attributes(SCENE.attributes[:6]) == SCENE


def test_word_ids_name_the_words_and_leave_the_second_object_null():
    ids = word_ids(attributes_of([SCENE]))[0]
    assert ids.shape == (N_SLOTS,) and ids.dtype == torch.long
    assert {field: VOCAB[int(ids[slot])] for field, slot in SLOTS.items()} == {f: getattr(SCENE, f) for f in FIELDS}
    assert all(ids[slot] == 0 for slot in SECOND_OBJECT_SLOTS)


def test_word_ids_of_two_objects_use_the_same_words_in_other_slots():
    ids = word_ids(attributes_of([BOTH, SCENE]))
    assert [VOCAB[int(ids[0, slot])] for slot in SECOND_OBJECT_SLOTS] == ["large", "blue", "ring", "still"]
    assert (ids[0, [0, 1, 2, 3, 8, 9]] == ids[1, [0, 1, 2, 3, 8, 9]]).all() and (ids[1, 4:8] == 0).all()


def test_a_model_of_one_object_refuses_two():
    require_objects([PROMPT, PAIR], 2)
    with pytest.raises(PromptError, match="names two objects, but world-nano was trained on one: remove 'and a"):
        require_objects([PROMPT, PAIR], 1, "world-nano")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (PROMPT.replace("circle", "circel"), "unknown word 'circel'.*nearest: 'circle'.*shape: circle, square"),
        (PROMPT.replace("red", "crimson"), "unknown word 'crimson'.*colour: red, green"),
        (PROMPT.replace("a small", "A small"), "unknown word 'A'"),
        (PROMPT.replace("red circle", "circle red"), "'circle' is not a colour"),
        (PROMPT.replace("small ", ""), "does not follow the grammar"),
        (PROMPT.replace("moving up-left", "moving still"), "does not follow the grammar"),
        (PROMPT.replace(" ", "  "), "does not follow the grammar"),
        (PAIR.replace("moving up-left", "moving still"), "does not follow the grammar"),
        (PAIR.replace("standing still", "moving still"), "does not follow the grammar"),
        (PAIR.replace("blue", "red"), "both objects are red: two objects need different colours"),
        (PAIR.replace(" on a", " and a small white cross moving up on a"), "does not follow the grammar"),
        (PAIR.replace("blue ring", "ring blue"), "'ring' is not a colour"),
        ("", "does not follow the grammar"),
    ],
)
def test_other_prompts_are_refused_in_one_sentence(prompt, said):
    with pytest.raises(PromptError, match=said) as refusal:
        parse(prompt)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_a_scene_refuses_words_of_other_fields():
    with pytest.raises(PromptError, match="'pink' is not a colour"):
        Scene("small", "pink", "circle", "up", "plain", "navy")
