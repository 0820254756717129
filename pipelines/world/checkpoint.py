"""Checkpoints of a training run: safetensors files and one JSON file, no pickle.

Notable choices
- Weights, both Adam moments and the average are kept in fp32 in one file, so a resumed run repeats an uninterrupted one.
- A compact checkpoint, for machines that hand out little, keeps weights in fp32, the average in fp16 and the moments in
  bf16, in files below `SHARD` bytes; a run resumed from it goes on very nearly as it would have.
- The JSON file is written last and names the tensor files: a run that is cut off while saving leaves the previous
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
from foveal.pipelines.world.training import Recipe, Trainer

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD = 15 * 2**20
COMPACT = {"ema": torch.float16, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}


def save(trainer: Trainer, folder: Path, *, compact: bool = False, **facts: Any) -> None:
    """Write the trainer's state; `facts` (JSON values) come back from `resume`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, p in trainer.named.items():
        state = trainer.optimizer.state[p]
        tensors |= {f"weight/{name}": p.detach(), f"ema/{name}": trainer.ema[name]}
        tensors |= {f"{moment}/{name}": state[moment] for moment in MOMENTS if moment in state}
    if compact:
        tensors = {key: value.to(COMPACT.get(key.split("/")[0], value.dtype)) for key, value in tensors.items()}
    files = _write_tensors(tensors, folder / f"state-{trainer.step:08d}", SHARD if compact else None)
    loss = None if trainer.loss is None else trainer.loss.item()
    losses = {str(size): value.item() for size, value in trainer.losses.items()}
    record = {"files": files, "step": trainer.step, "clips": trainer.clips, "loss": loss, "losses": losses}
    part = folder / f"{STATE}.part"
    part.write_text(json.dumps({**record, "recipe": _plain(trainer.recipe), **facts}), encoding="utf-8")
    os.replace(part, folder / STATE)
    for old in folder.glob("state-*.safetensors"):
        if old.name not in files:
            old.unlink()


def _write_tensors(tensors: dict[str, Tensor], stem: Path, limit: int | None) -> list[str]:
    """One file, or as many as keep each below `limit` bytes.  -> their names"""
    groups: list[dict[str, Tensor]] = [{}]
    used = 0
    for key, value in tensors.items():
        size = value.numel() * value.element_size()
        if limit is not None and groups[-1] and used + size > limit:
            groups.append({})
            used = 0
        groups[-1][key] = value.contiguous().cpu()
        used += size
    names = [f"{stem.name}{f'-{i}' if len(groups) > 1 else ''}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        save_file(group, stem.parent / name)
    return names


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON gives it back."""
    return json.loads(json.dumps(asdict(recipe)))


def resume(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Continue where `save` left off.  -> the record, with the facts given to `save`

    Raises ValueError if there is no checkpoint or it belongs to another recipe.
    """
    record, tensors = _read(folder)
    recipe = _plain(trainer.recipe)
    if record["recipe"] != recipe:
        other = [key for key, value in recipe.items() if record["recipe"].get(key) != value]
        raise ValueError(f"the checkpoint in {folder} has other {', '.join(other)}: resume with the same options.")
    trainer.put(_part(tensors, "weight"))
    averages = _part(tensors, "ema")
    trainer.ema = {name: averages[name].float().to(trainer.device) for name in trainer.named}
    moments = {moment: _part(tensors, moment) for moment in MOMENTS}
    names = {id(p): name for name, p in trainer.named.items()}
    order = [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]
    state = trainer.optimizer.state_dict()
    state["state"] = {
        i: {"step": torch.tensor(float(record["step"])), **{m: moments[m][name].float() for m in MOMENTS}}
        for i, name in enumerate(order)
        if name in moments[MOMENTS[0]]
    }
    trainer.optimizer.load_state_dict(state)
    trainer.step, trainer.clips = record["step"], record["clips"]
    trainer.loss = None if record["loss"] is None else torch.tensor(record["loss"], device=trainer.device)
    trainer.losses = {int(k): torch.tensor(value, device=trainer.device) for k, value in record["losses"].items()}
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
    tensors: dict[str, Tensor] = {}
    for name in record["files"]:
        tensors |= load_file(folder / name)
    return record, tensors


def _part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
