"""Checkpoints that travel: four safetensors files below 16 MB and one JSON file.

Notable choices
- Everything is kept in fp32: a resumed run is the uninterrupted one.
- The JSON file is written last and names the files: a run that is cut off while saving leaves the previous checkpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveal.pipelines.lina.training import Trainer

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(trainer: Trainer, folder: Path, **facts: Any) -> None:
    """Write the trainer's state; ``facts`` (JSON values) come back from ``resume``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Tensor]] = {"weights": dict(trainer.model.named_parameters()), "average": trainer.ema}
    for moment in MOMENTS:
        state = {name: trainer.optimizer.state[p] for name, p in trainer.named.items()}
        parts[moment] = {name: s[moment] for name, s in state.items() if moment in s}
    files = {part: f"{part}-{trainer.step:07d}.safetensors" for part in parts}
    for part, tensors in parts.items():
        save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, folder / files[part])
    loss = None if trainer.loss is None else trainer.loss.item()
    record = {"files": files, "step": trainer.step, "loss": loss, "recipe": asdict(trainer.recipe), **facts}
    part_file = folder / f"{STATE}.part"
    part_file.write_text(json.dumps(record), encoding="utf-8")
    os.replace(part_file, folder / STATE)
    for old in folder.glob("*.safetensors"):
        if old.name not in files.values():
            old.unlink()


def resume(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Continue where ``save`` left off.  -> the record, with the facts given to ``save``

    Raises ValueError if there is no checkpoint or it belongs to another recipe.
    """
    if not (folder / STATE).is_file():
        raise ValueError(f"there is no checkpoint in {folder}: it should hold {STATE}; start without --resume.")
    record = json.loads((folder / STATE).read_text(encoding="utf-8"))
    own = asdict(trainer.recipe)
    if record["recipe"] != own:
        other = [key for key, value in own.items() if record["recipe"].get(key) != value]
        raise ValueError(f"the checkpoint in {folder} has other {', '.join(other)}: resume with the same options.")
    weights, average, *moments = (
        load_file(folder / record["files"][part]) for part in ("weights", "average", *MOMENTS)
    )
    trainer.put(weights)
    trainer.ema = {name: average[name].to(trainer.device) for name in trainer.ema}
    trainer.step = record["step"]
    names = {id(p): name for name, p in trainer.named.items()}
    order = [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]
    state = trainer.optimizer.state_dict()
    state["state"] = {
        i: {"step": torch.tensor(float(record["step"])), **{m: moments[k][name] for k, m in enumerate(MOMENTS)}}
        for i, name in enumerate(order)
        if name in moments[0]
    }
    trainer.optimizer.load_state_dict(state)
    trainer.loss = None if record["loss"] is None else torch.tensor(record["loss"], device=trainer.device)
    return record
