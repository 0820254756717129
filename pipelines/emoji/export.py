"""A trained emoji model as a folder: config.json, model.safetensors, text.safetensors (README.md is written by `card`).

Weights are fp16; config.json carries the architecture, the trained frame sizes, the sampler, the vocabulary, the digest
of the picture sheet and each weight file's SHA-256, and is all that `foveal.pipelines.shipped.load` needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.pipelines.emoji.loading import KIND
from foveal.pipelines.emoji.models import TOY, EmojiSpec
from foveal.pipelines.emoji.sheet import FILE
from foveal.pipelines.emoji.vocabulary import CANVASES, VOCAB
from foveal.pipelines.world.export import FILES, sha256, write_weights


def export(folder: Path, spec: EmojiSpec, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Write fp16 weights and config.json.

    weights: any float dtype, names start with "model." or "text.".  -> the config written
    """
    params = write_weights(folder, weights)
    config = {
        "id": spec.id,
        "kind": KIND,
        "note": TOY,
        "size": spec.size,
        "sizes": list(CANVASES),
        "steps": spec.steps,
        "guidance": spec.guidance,
        "shifts": {str(size): shift for size, shift in spec.shifts.items()},
        "params": params,
        "transformer": {**spec.transformer, "axes_dims_rope": list(spec.transformer["axes_dims_rope"])},
        "words": list(VOCAB),
        "pictures": {"file": FILE.name, "sha256": sha256(FILE)},
        "files": {name: {"sha256": sha256(folder / name)} for name in FILES},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config
