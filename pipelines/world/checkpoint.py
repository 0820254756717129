"""Checkpoints of a training run: one safetensors file and one JSON file, no pickle.

Notable choices
- Weights, both Adam moments and the average are kept in fp32, so a resumed run repeats an uninterrupted one.
- The JSON file is written last and names the tensor file: a run that is cut off while saving leaves the previous
  checkpoint.
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

from foveal.pipelines.world.export import FILES
from foveal.pipelines.world.training import Trainer

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(trainer: Trainer, folder: Path, **facts: Any) -> None:
    """Write the trainer's state; `facts` (JSON values) come back from `resume`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, p in trainer.named.items():
        state = trainer.optimizer.state[p]
        tensors |= {f"weight/{name}": p.detach(), f"ema/{name}": trainer.ema[name]}
        tensors |= {f"{moment}/{name}": state[moment] for moment in MOMENTS if moment in state}
    file = folder / f"state-{trainer.step:08d}.safetensors"
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, file)
    loss = None if trainer.loss is None else trainer.loss.item()
    record = {"file": file.name, "step": trainer.step, "loss": loss, "recipe": asdict(trainer.recipe), **facts}
    part = folder / f"{STATE}.part"
    part.write_text(json.dumps(record), encoding="utf-8")
    os.replace(part, folder / STATE)
    for old in folder.glob("state-*.safetensors"):
        if old != file:
            old.unlink()


def resume(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Continue where `save` left off.  -> the record, with the facts given to `save`

    Raises ValueError if there is no checkpoint or it belongs to another recipe.
    """
    record, tensors = _read(folder)
    if record["recipe"] != asdict(trainer.recipe):
        other = [key for key, value in asdict(trainer.recipe).items() if record["recipe"].get(key) != value]
        raise ValueError(f"the checkpoint in {folder} has other {', '.join(other)}: resume with the same options.")
    trainer.put(_part(tensors, "weight"))
    averages = _part(tensors, "ema")
    trainer.ema = {name: averages[name].to(trainer.device) for name in trainer.named}
    moments = {moment: _part(tensors, moment) for moment in MOMENTS}
    names = {id(p): name for name, p in trainer.named.items()}
    order = [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]
    state = trainer.optimizer.state_dict()
    state["state"] = {
        i: {"step": torch.tensor(float(record["step"])), **{moment: moments[moment][name] for moment in MOMENTS}}
        for i, name in enumerate(order)
        if name in moments[MOMENTS[0]]
    }
    trainer.optimizer.load_state_dict(state)
    trainer.step = record["step"]
    trainer.loss = None if record["loss"] is None else torch.tensor(record["loss"], device=trainer.device)
    return record


def start_from(trainer: Trainer, folder: Path) -> None:
    """Take the raw weights of another run's checkpoint, or the weights of an exported model, with a fresh optimizer."""
    if (folder / FILES[0]).is_file():
        model, text = (load_file(folder / name) for name in FILES)
        weights = {f"model.{name}": x.float() for name, x in model.items()} | {
            name: x.float() for name, x in text.items()
        }
    else:
        weights = _part(_read(folder)[1], "weight")
    trainer.put(weights)
    trainer.ema = {name: p.detach().clone() for name, p in trainer.named.items()}


def exists(folder: Path) -> bool:
    return (folder / STATE).is_file()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not exists(folder):
        raise ValueError(
            f"there is no checkpoint in {folder}: it should hold {STATE}; start without --resume or --init."
        )
    record = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return record, load_file(folder / record["file"])


def _part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
