"""Checkpoints of a training run: safetensors files and one JSON file, no pickle.

Notable choices
- Weights, both Adam moments and the average are kept in fp32 in one file, so a resumed run repeats an uninterrupted one.
- A compact checkpoint, for machines that hand out little, keeps weights in fp32, the average in fp16 and the moments in
  bf16, in files below `SHARD` bytes; a run resumed from it goes on very nearly as it would have.
- The JSON file is written last and names the tensor files: a run that is cut off while saving leaves the previous
  checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveal.pipelines.training_state import MOMENTS, plain, read, require_recipe, restore_moments, write
from foveal.pipelines.world.export import FILES
from foveal.pipelines.world.training import Trainer

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
    write(folder, {**record, "recipe": plain(trainer.recipe), **facts}, files, "state-*.safetensors")


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


def resume(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Continue where `save` left off.  -> the record, with the facts given to `save`

    Raises ValueError if there is no checkpoint or it belongs to another recipe.
    """
    record, tensors = _read(folder)
    require_recipe(record, trainer.recipe, folder)
    trainer.put(_part(tensors, "weight"))
    averages = _part(tensors, "ema")
    trainer.ema = {name: averages[name].float().to(trainer.device) for name in trainer.named}
    moments = {moment: _part(tensors, moment) for moment in MOMENTS}
    restore_moments(trainer.optimizer, trainer.named, moments, record["step"])
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


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    record = read(folder, "--resume or --init")
    tensors: dict[str, Tensor] = {}
    for name in record["files"]:
        tensors |= load_file(folder / name)
    return record, tensors


def _part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
