"""A trained emoji model as a folder: config.json, model.safetensors, text.safetensors (README.md is written by `card`).

Weights are fp16; config.json carries the architecture, the trained frame sizes, the sampler, the vocabulary, the digest
of the picture sheet and each weight file's SHA-256, and is all that `foveal.pipelines.shipped.load` needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from foveal.pipelines.emoji.loading import KIND
from foveal.pipelines.emoji.models import TOY, EmojiSpec
from foveal.pipelines.emoji.sheet import FILE
from foveal.pipelines.emoji.vocabulary import CANVASES, VOCAB
from foveal.pipelines.world.export import FILES, sha256


def export(folder: Path, spec: EmojiSpec, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Write fp16 weights and config.json.

    weights: any float dtype, names start with "model." or "text.".  -> the config written
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = {key: value.detach().half().contiguous().cpu() for key, value in weights.items()}
    model = {key.removeprefix("model."): value for key, value in half.items() if key.startswith("model.")}
    text = {key: value for key, value in half.items() if key.startswith("text.")}
    for name, tensors in zip(FILES, (model, text), strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)
    config = {
        "id": spec.id,
        "kind": KIND,
        "note": TOY,
        "size": spec.size,
        "sizes": list(CANVASES),
        "steps": spec.steps,
        "guidance": spec.guidance,
        "shifts": {str(size): shift for size, shift in spec.shifts.items()},
        "params": sum(value.numel() for value in model.values()),
        "transformer": {**spec.transformer, "axes_dims_rope": list(spec.transformer["axes_dims_rope"])},
        "words": list(VOCAB),
        "pictures": {"file": FILE.name, "sha256": sha256(FILE)},
        "files": {name: {"sha256": sha256(folder / name)} for name in FILES},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config
