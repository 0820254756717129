"""Checkpoints that travel: three safetensors files below 16 MB and one JSON file.

Notable choices
- Weights are fp16 and both Adam moments bf16, so a resumed run goes on from the same place but not bit by bit. The
  average is not kept here: the exported model is the average, and a run that resumes reads it from there, or starts its
  average from the weights where there is none.
- The JSON file is written last and names the files: a run that is cut off while saving leaves the previous checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveal.pipelines.emoji.training import EmojiTrainer
from foveal.pipelines.training_state import MOMENTS, plain, read, require_recipe, restore_moments, write
from foveal.pipelines.world.export import FILES


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
    record = {"files": files, "step": trainer.step, "recipe": plain(trainer.recipe), **facts}
    record["seen"] = {str(size): n for size, n in trainer.seen.items()}
    record["losses"] = {str(size): loss.item() for size, loss in trainer.losses.items()}
    write(folder, record, files.values())


def resume(trainer: EmojiTrainer, folder: Path, exported: Path) -> dict[str, Any]:
    """Continue where `save` left off.  -> the record, with the facts given to `save`

    exported: folder of the model exported at the same time, for the average. Raises ValueError if there is no checkpoint or
    it belongs to another recipe.
    """
    record = read(folder)
    require_recipe(record, trainer.recipe, folder)
    weights, *moments = (load_file(folder / record["files"][part]) for part in ("weights", *MOMENTS))
    trainer.put(weights)
    average = _average(exported) or weights
    trainer.ema = {name: average[name].float().to(trainer.device) for name in trainer.named}
    restore_moments(trainer.optimizer, trainer.named, dict(zip(MOMENTS, moments, strict=True)), record["step"])
    trainer.step, trainer.clips = record["step"], sum(record["seen"].values())
    trainer.seen |= {int(size): n for size, n in record["seen"].items()}
    trainer.losses = {int(size): torch.tensor(x, device=trainer.device) for size, x in record["losses"].items()}
    return record


def _average(exported: Path) -> dict[str, Tensor]:
    if not all((exported / name).is_file() for name in FILES):
        return {}
    model, text = (load_file(exported / name) for name in FILES)
    return {f"model.{name}": x for name, x in model.items()} | text
