"""Checkpoints that travel: three safetensors files below 16 MB and one JSON file.

Notable choices
- Weights are fp16 and both Adam moments bf16, so a resumed run goes on from the same place but not bit by bit. The
  average is not kept here: the exported model is the average, and a run that resumes reads it from there, or starts its
  average from the weights where there is none.
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

from foveal.pipelines.emoji.training import EmojiTrainer
from foveal.pipelines.world.export import FILES

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(trainer: EmojiTrainer, folder: Path, **facts: Any) -> None:
    """Write the trainer's state; `facts` (JSON values) come back from `resume`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Tensor]] = {"weights": {name: p.detach().half() for name, p in trainer.named.items()}}
    for moment in MOMENTS:
        state = {name: trainer.optimizer.state[p] for name, p in trainer.named.items()}
        parts[moment] = {name: s[moment].bfloat16() for name, s in state.items() if moment in s}
    files = {}
    for part, tensors in parts.items():
        files[part] = f"{part}-{trainer.step:07d}.safetensors"
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, folder / files[part])
    record = {"files": files, "step": trainer.step, "recipe": _plain(trainer), **facts}
    record["seen"] = {str(size): n for size, n in trainer.seen.items()}
    record["losses"] = {str(size): loss.item() for size, loss in trainer.losses.items()}
    part_file = folder / f"{STATE}.part"
    part_file.write_text(json.dumps(record), encoding="utf-8")
    os.replace(part_file, folder / STATE)
    for old in folder.glob("*.safetensors"):
        if old.name not in files.values():
            old.unlink()


def resume(trainer: EmojiTrainer, folder: Path, exported: Path) -> dict[str, Any]:
    """Continue where `save` left off.  -> the record, with the facts given to `save`

    exported: folder of the model exported at the same time, for the average. Raises ValueError if there is no checkpoint or
    it belongs to another recipe.
    """
    if not (folder / STATE).is_file():
        raise ValueError(f"there is no checkpoint in {folder}: it should hold {STATE}; start without --resume.")
    record = json.loads((folder / STATE).read_text(encoding="utf-8"))
    plain = _plain(trainer)
    if record["recipe"] != plain:
        other = [key for key, value in plain.items() if record["recipe"].get(key) != value]
        raise ValueError(f"the checkpoint in {folder} has other {', '.join(other)}: resume with the same options.")
    weights, *moments = (load_file(folder / record["files"][part]) for part in ("weights", *MOMENTS))
    trainer.put(weights)
    average = _average(exported) or weights
    trainer.ema = {name: average[name].float().to(trainer.device) for name in trainer.named}
    names = {id(p): name for name, p in trainer.named.items()}
    order = [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]
    state = trainer.optimizer.state_dict()
    state["state"] = {
        i: {"step": torch.tensor(float(record["step"])), **{m: moments[k][name].float() for k, m in enumerate(MOMENTS)}}
        for i, name in enumerate(order)
        if name in moments[0]
    }
    trainer.optimizer.load_state_dict(state)
    trainer.step, trainer.clips = record["step"], sum(record["seen"].values())
    trainer.seen |= {int(size): n for size, n in record["seen"].items()}
    trainer.losses = {int(size): torch.tensor(x, device=trainer.device) for size, x in record["losses"].items()}
    return record


def _average(exported: Path) -> dict[str, Tensor]:
    if not all((exported / name).is_file() for name in FILES):
        return {}
    model, text = (load_file(exported / name) for name in FILES)
    return {f"model.{name}": x for name, x in model.items()} | text


def _plain(trainer: EmojiTrainer) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    return json.loads(json.dumps(asdict(trainer.recipe)))
