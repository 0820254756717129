"""A trained LINA as a folder: config.json, model.safetensors, judge.safetensors (README.md is written by ``card``).

Weights are fp16; config.json carries the architecture, the sampler, the names of the classes and each file's SHA-256, and is all that
loading needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from foveal.pipelines.lina.loading import JUDGE_FILE, KIND, MODEL_FILE
from foveal.pipelines.lina.models import LinaSpec


def export(
    folder: Path,
    spec: LinaSpec,
    classes: tuple[str, ...],
    weights: dict[str, Tensor],
    judge: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write fp16 weights and config.json.  -> the config written

    weights, judge: any float dtype. Without a judge its file is left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in ((MODEL_FILE, weights), (JUDGE_FILE, judge)):
        if tensors is not None:
            save_file(
                {key: value.detach().half().contiguous().cpu() for key, value in tensors.items()},
                folder / name,
                {"format": "pt"},
            )
            (folder / name).chmod(0o644)
    config = {
        "id": spec.id, "kind": KIND, "note": spec.note, "size": spec.size, "steps": spec.steps, "flow_steps": spec.flow_steps,
        "guidance": spec.guidance, "min_guidance": spec.min_guidance, "params": sum(value.numel() for value in weights.values()),
        "network": dataclasses.asdict(spec.config), "classes": list(classes),
        "files": {name: {"sha256": sha256(folder / name)} for name in (MODEL_FILE, JUDGE_FILE) if (folder / name).is_file()},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
