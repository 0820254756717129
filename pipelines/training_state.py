"""What the checkpoints of all training runs share: one JSON record beside safetensors files, no pickle.

Notable choices
- The record is written last and names the files: a run that is cut off while saving leaves the previous checkpoint.
- A checkpoint belongs to one recipe; with another one it is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


def write(folder: Path, record: dict[str, Any], kept: Collection[str], pattern: str = "*.safetensors") -> None:
    """Write the record, then delete the tensor files of ``pattern`` that are not in ``kept``."""
    part = folder / f"{STATE}.part"
    part.write_text(json.dumps(record), encoding="utf-8")
    os.replace(part, folder / STATE)
    for old in folder.glob(pattern):
        if old.name not in kept:
            old.unlink()


def read(folder: Path, without: str = "--resume") -> dict[str, Any]:
    """The record. Raises ValueError where there is none; ``without`` names the options that ask for it."""
    if not (folder / STATE).is_file():
        raise ValueError(f"there is no checkpoint in {folder}: it should hold {STATE}; start without {without}.")
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def plain(recipe: Any) -> dict[str, Any]:
    """A recipe, a dataclass, as JSON gives it back."""
    return json.loads(json.dumps(asdict(recipe)))


def require_recipe(record: dict[str, Any], recipe: Any, folder: Path) -> None:
    """Raises ValueError, which names the fields that differ."""
    own = plain(recipe)
    if record["recipe"] != own:
        other = [key for key, value in own.items() if record["recipe"].get(key) != value]
        raise ValueError(f"the checkpoint in {folder} has other {', '.join(other)}: resume with the same options.")


def restore_moments(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    step: int,
) -> None:
    """Put Adam's moments back. named: parameters by name; moments: by moment, then by parameter's name, any float dtype."""
    names = {id(p): name for name, p in named.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {
        i: {"step": torch.tensor(float(step)), **{moment: moments[moment][name].float() for moment in MOMENTS}}
        for i, name in enumerate(order)
        if name in moments[MOMENTS[0]]
    }
    optimizer.load_state_dict(state)
