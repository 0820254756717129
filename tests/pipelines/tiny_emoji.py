"""An untrained model of the emoji world in a folder."""

from tiny_world import random_weights

from foveal.pipelines.emoji.export import export
from foveal.pipelines.emoji.models import MODELS, build_transformer
from foveal.pipelines.emoji.text import TextTable

PROMPTS = ["a large fox on a mint plain background", "a small owl left of a large rose on a navy checker background"]


def make_model(folder):
    """A random transformer, 16 x 16 tokens."""
    spec = MODELS["tiny"]
    export(folder / "tiny", spec, random_weights(lambda: build_transformer(spec.transformer, "twin"), TextTable))
    return folder / "tiny"
