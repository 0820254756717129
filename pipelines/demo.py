"""`foveal demo`: two studies on the shipped toy models, offline, on a CPU, in under two minutes.

Notable choices
- The first line says that the models are toys; no number here is a number of a large model.
- The first study shows speed on one prompt, the second quality on 16 prompts x 2 seeds with intervals; they are not mixed.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from foveal.pipelines.config import load
from foveal.pipelines.engine import Outcome, execute
from foveal.pipelines.progress import Quiet, Voice

FIRST_LINE = "Toy models trained on a synthetic world: these figures show how methods differ here and do not transfer to large models."
FAST = ("world-nano",)


def demo(overrides: Sequence[str] = (), *, fast: bool = False, voice: Voice | None = None) -> Outcome:
    """Run the demo. fast: only the second study (quality, about half a minute).

    A study whose model is not installed is named and left out; with none left, UserError.
    """
    listener: Voice = voice or Quiet()
    listener.say(FIRST_LINE)
    command = shlex.join(["foveal", "demo", *(["--fast"] if fast else []), *overrides])
    return execute(load("demo", overrides), verb="demo", voice=listener, command=command, only=FAST if fast else ())
