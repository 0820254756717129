"""A trained model as a folder: config.json, model.safetensors, text.safetensors (README.md is written by `card`).

Weights are fp16; config.json carries the architecture, the clip, the sampler, the vocabulary and each file's
SHA-256, and is all that `foveal.pipelines.shipped.load` needs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from foveal.pipelines.world.models import TOY, ModelSpec
from foveal.pipelines.world.vocabulary import VOCAB

FILES = ("model.safetensors", "text.safetensors")


def export(folder: Path, spec: ModelSpec, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Write fp16 weights and config.json.

    weights: any float dtype, names start with "model." or "text.".  -> the config written
    """
    return write_config(folder, spec, write_weights(folder, weights))


def write_weights(folder: Path, weights: dict[str, Tensor]) -> int:
    """Write the weight files.  -> parameters of the network"""
    folder.mkdir(parents=True, exist_ok=True)
    half = {key: value.detach().half().contiguous().cpu() for key, value in weights.items()}
    model = {key.removeprefix("model."): value for key, value in half.items() if key.startswith("model.")}
    text = {key: value for key, value in half.items() if key.startswith("text.")}
    for name, tensors in zip(FILES, (model, text), strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)
    return sum(value.numel() for value in model.values())


def write_config(folder: Path, spec: ModelSpec, params: int) -> dict[str, Any]:
    """Write config.json for the weight files in `folder`; a file that is not there yet gets a null SHA-256."""
    config = {
        "id": spec.id,
        "note": TOY,
        "frames": spec.frames,
        "size": spec.size,
        "steps": spec.steps,
        "guidance": spec.guidance,
        "shift": spec.shift,
        "world": spec.world,
        "objects": spec.objects,
        "shifts": {str(size): shift for size, shift in spec.sizes.items()},
        "gates": [list(gate) for gate in spec.gates],
        "params": params,
        "transformer": {**spec.transformer, "patch_size": list(spec.transformer["patch_size"])},
        "words": list(VOCAB),
        "files": {name: {"sha256": sha256(folder / name)} for name in FILES},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def record(folder: Path, **facts: Any) -> None:
    """Add facts (JSON values) to a written config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | facts
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def sha256(file: Path) -> str | None:
    """Hex digest of a file, None if it is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
