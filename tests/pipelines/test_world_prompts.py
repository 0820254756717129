"""Laws of the fixed prompts and of the held-out combinations."""

import pytest
import torch

from foveal.pipelines.world.prompts import (
    HELD_OUT_PROMPTS,
    HELD_OUT_TRIPLES,
    VALIDATION_PROMPTS,
    draw_attributes,
    triples,
    validation_prompts,
)
from foveal.pipelines.world.vocabulary import FIELDS, parse, scenes_of


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
