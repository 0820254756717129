"""Laws of the fixed prompts and of the held-out combinations."""

import pytest
import torch

from foveal.pipelines.world.prompts import (
    HELD_OUT_PAIR_PROMPTS,
    HELD_OUT_PROMPTS,
    HELD_OUT_TRIPLES,
    PAIR_PROMPTS,
    VALIDATION_PROMPTS,
    draw_attributes,
    triples,
    validation_prompts,
)
from foveal.pipelines.world.vocabulary import FIELDS, parse, scenes_of


def triples_of(prompt) -> list[tuple[str, str, str]]:
    return [(thing.colour, thing.shape, thing.motion) for thing in parse(prompt).things]


def triple(scene) -> tuple[str, str, str]:
    return scene.colour, scene.shape, scene.motion


def test_held_out_triples_are_those_drawn_before_training():
    order = torch.randperm(360, generator=torch.Generator().manual_seed(20))[:18].tolist()
    colours, shapes, motions = FIELDS["colour"], FIELDS["shape"], FIELDS["motion"]
    assert {(colours[k // 45], shapes[k // 9 % 5], motions[k % 9]) for k in order} == HELD_OUT_TRIPLES


def test_validation_prompts_parse_are_distinct_and_were_seen():
    scenes = [parse(prompt) for prompt in VALIDATION_PROMPTS]
    assert len(set(scenes)) == 64
    assert not any(triple(scene) in HELD_OUT_TRIPLES for scene in scenes)


@pytest.mark.parametrize("n", [16, 32, 64])
def test_prefixes_cover_every_word(n):
    scenes = [parse(prompt) for prompt in validation_prompts(n)]
    for field, words in FIELDS.items():
        assert {getattr(scene, field) for scene in scenes} == set(words)


@pytest.mark.parametrize("start", [0, 16, 32, 48])
def test_sixteen_pair_prompts_cover_every_word_for_both_objects(start):
    scenes = [parse(prompt) for prompt in PAIR_PROMPTS[start : start + 16]]
    for field, words in FIELDS.items():
        assert {getattr(scene, field) for scene in scenes} == set(words)
        if field not in ("style", "background"):
            assert {getattr(scene.second, field) for scene in scenes} == set(words)


def test_pair_prompts_are_distinct_and_of_seen_triples():
    assert len(set(PAIR_PROMPTS)) == 64
    assert not any(t in HELD_OUT_TRIPLES for prompt in PAIR_PROMPTS for t in triples_of(prompt))


def test_held_out_pair_prompts_have_one_held_out_triple_each_first_and_second_in_turn():
    held = [[t in HELD_OUT_TRIPLES for t in triples_of(prompt)] for prompt in HELD_OUT_PAIR_PROMPTS]
    assert held == [[True, False], [False, True]] * 18
    shown = [t for prompt in HELD_OUT_PAIR_PROMPTS for t in triples_of(prompt) if t in HELD_OUT_TRIPLES]
    assert sorted(shown) == sorted([*HELD_OUT_TRIPLES] * 2)


def test_mixed_prompts_alternate_between_one_object_and_two():
    mixed = validation_prompts(objects=0)
    assert [len(parse(prompt).things) for prompt in mixed] == [1, 2] * 32
    assert mixed[:4] == [VALIDATION_PROMPTS[0], PAIR_PROMPTS[0], VALIDATION_PROMPTS[1], PAIR_PROMPTS[1]]
    assert validation_prompts(8, objects=2) == list(PAIR_PROMPTS[:8])
    with pytest.raises(ValueError, match="with 3 objects"):
        validation_prompts(8, objects=3)


def test_held_out_prompts_show_every_held_out_triple_twice():
    shown = [triple(parse(prompt)) for prompt in HELD_OUT_PROMPTS]
    assert sorted(shown) == sorted([*HELD_OUT_TRIPLES] * 2)
    assert validation_prompts(36, held_out=True) == list(HELD_OUT_PROMPTS)


@pytest.mark.parametrize(("n", "held_out"), [(0, False), (65, False), (37, True)])
def test_more_prompts_than_there_are_is_an_error(n, held_out):
    with pytest.raises(ValueError, match="there are 1 to"):
        validation_prompts(n, held_out)


@pytest.mark.parametrize("held_out", [False, True])
def test_drawn_scenes_respect_the_split(held_out):
    assert len(triples(held_out)) == (18 if held_out else 342)
    attributes = draw_attributes(500, torch.Generator().manual_seed(0), held_out)
    assert all((triple(scene) in HELD_OUT_TRIPLES) == held_out for scene in scenes_of(attributes))
    again = draw_attributes(500, torch.Generator().manual_seed(0), held_out)
    assert torch.equal(attributes, again)


@pytest.mark.parametrize("held_out", [False, True])
def test_second_objects_have_another_colour_and_respect_the_split(held_out):
    attributes = draw_attributes(2000, torch.Generator().manual_seed(0), held_out, pairs=0.4)
    scenes = scenes_of(attributes)
    two = [scene for scene in scenes if scene.second is not None]
    assert len(two) == pytest.approx(800, abs=80)
    assert all(scene.colour != scene.second.colour for scene in two)
    things = [thing for scene in scenes for thing in scene.things]
    assert all(((t.colour, t.shape, t.motion) in HELD_OUT_TRIPLES) == held_out for t in things)
    if not held_out:
        assert {t.colour for scene in two for t in (scene.second,)} == set(FIELDS["colour"])


def test_one_object_scenes_are_drawn_as_before_there_were_two():
    attributes = draw_attributes(3, torch.Generator().manual_seed(3))
    assert (attributes[:, 6:] == -1).all()
    both = draw_attributes(3, torch.Generator().manual_seed(3), pairs=1.0)
    assert torch.equal(both[:, :6], attributes[:, :6]) and (both[:, 6:] >= 0).all()
