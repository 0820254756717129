"""`foveal run`: one YAML is one run. Methods of the config on its prompts and seeds, with dense beside them where needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foveal.pipelines.config import load
from foveal.pipelines.engine import Outcome, execute
from foveal.pipelines.progress import Voice


def run(source: str | Path, overrides: Sequence[str] = (), *, voice: Voice | None = None) -> Outcome:
    """Run a config file (or a shipped config by name) and write media, result.json and report.html.

    overrides: "key=value" strings on top of the file. Finished samples in the output folder are kept and not repeated.
    Raises UserError in one sentence for whatever is wrong with the input, Interrupted on Ctrl-C.
    """
    return execute(load(source, overrides), verb="run", voice=voice)
