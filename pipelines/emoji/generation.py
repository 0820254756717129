"""A study's model when it is the emoji model: checked prompts and size, facts for the record, and a `Generator`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foveal.pipelines.emoji.models import PATCH
from foveal.pipelines.emoji.vocabulary import parse
from foveal.pipelines.errors import UserError

if TYPE_CHECKING:
    import torch

    from foveal.pipelines.generator import Generator
    from foveal.pipelines.schema import StudyConfig


def emoji_generator(study: StudyConfig, source: str | Path, device: torch.device, dtype: torch.dtype) -> Generator:
    """An emoji model, by shipped name or folder. Raises UserError in one sentence for whatever does not fit."""
    from foveal.pipelines import shipped
    from foveal.pipelines.generator import Generator

    if study.height != study.width or study.frames not in (None, 1):
        raise UserError(
            f"frames is {study.frames}, height {study.height}, width {study.width}; the emoji model makes single square "
            "images: give height and width the same value and leave frames out."
        )
    for prompt in study.prompts:
        parse(prompt)
    pipe = shipped.load(source, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    card, size = pipe.card, study.height or pipe.card.size
    edge = pipe._frame(size) // PATCH
    trained = ", ".join(map(str, card.sizes))
    outside = f"{size} px is outside its training sizes ({trained} px): read speed and fidelity to dense only."
    facts = {
        "id": card.id, "kind": card.kind, "sha256": card.sha256, "tokens": edge * edge, "grid": [1, edge, edge], "frames": 1,
        "size": size, "steps": study.sampler.steps or card.steps,
        "guidance": card.guidance if study.sampler.guidance is None else study.sampler.guidance,
        "dtype": str(dtype).removeprefix("torch."), "device": device.type, "params": card.params, "layers": card.layers,
        "heads": card.heads, "head_dim": card.head_dim, "toy": card.toy, "objects": card.objects, "sizes": list(card.sizes),
        "note": card.note,
    }  # fmt: skip
    if size not in card.sizes:
        facts |= {"note": f"{card.note}; {outside}", "outside": outside}
    return Generator(pipe, facts, device, world=True, arguments={"size": size})
