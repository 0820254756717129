"""The shipped toy models: what there is, where its files lie, and loading them into a pipeline.

    pipe = load("world-video")
    frames = pipe(["a small red circle moving right on a navy plain background"], seeds=[0]).frames
    images = load("emoji-flux")(["a large fox on a mint plain background"], seeds=[0]).images
    images = load("lina-fashion")(["ankle boot", "bag"]).images

Notable choices
- A model is a folder: config.json, model.safetensors, a second weight file (text.safetensors, or LINA's judge.safetensors),
  README.md (its card). Files are looked for
  in an explicit path, then in the package, then in the directory named by FOVEAL_WEIGHTS_DIR, which says where to
  look and nothing else; `pipe.card.folder` records where they were found.
- Every file is checked against the SHA-256 in config.json before it is read.
- `cards()` reads JSON only; diffusers is imported when a model is loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foveal.pipelines.emoji.loading import build, card_facts, is_emoji
from foveal.pipelines.errors import UserError
from foveal.pipelines.lina import loading as lina
from foveal.pipelines.world.models import TOY, token_grid
from foveal.pipelines.world.vocabulary import VOCAB

if TYPE_CHECKING:
    from foveal.pipelines.world.pipeline import WorldPipeline

ASSETS = Path(__file__).parent / "assets"
WEIGHTS_DIR = "FOVEAL_WEIGHTS_DIR"
MODEL_FILE, TEXT_FILE = "model.safetensors", "text.safetensors"


@dataclass(frozen=True, slots=True)
class Card:
    """Facts about one model. `sha256` is that of model.safetensors, None until weights were exported.

    kind: "world" (videos, `WorldPipeline`) "emoji" (images, `EmojiPipeline`) or "lina" (images of classes,
    `LinaPipeline`). files: its weights. objects: how many a prompt may name. world: the version of the pictures it learnt. shifts: (size, shift of the noise
    levels) of every size it was trained at.
    """

    id: str
    frames: int
    size: int
    grid: tuple[int, int, int]
    tokens: int
    steps: int
    guidance: float
    shift: float
    params: int
    layers: int
    heads: int
    head_dim: int
    sha256: str | None
    folder: Path
    objects: int = 1
    world: int = 1
    shifts: tuple[tuple[int, float], ...] = ()
    kind: str = "world"
    files: tuple[str, ...] = (MODEL_FILE, TEXT_FILE)
    toy: bool = True
    note: str = TOY

    @property
    def sizes(self) -> tuple[int, ...]:
        """Frame sizes it was trained at, in pixels."""
        return tuple(size for size, _ in self.shifts)

    @property
    def available(self) -> bool:
        """Whether the weights are there."""
        return all((self.folder / name).is_file() for name in self.files)


def cards() -> list[Card]:
    """Cards of the models in the package, by name; those without weights yet too (`card.available` is False)."""
    return [_card(_read_config(path.parent), path.parent) for path in sorted(ASSETS.glob("*/config.json"))]


def shipped() -> list[str]:
    """Names that `load` knows."""
    return [card.id for card in cards()]


def load(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
) -> Any:
    """Load a shipped model by name, or any folder in the same format by path.

    size: pixels of the clips that calls make unless told otherwise, one of `card.sizes` (the model's own by default);
    a call's `size` may be any that fits.

    dtype: of the transformer's weights; norms, modulation tables and the time embedding stay fp32, as in diffusers.
    The pipeline, a `WorldPipeline`, an `EmojiPipeline` or a `LinaPipeline`, carries its `card`.

    Raises UserError, a ValueError: an unknown name (nearest one suggested), a missing file, one that is not the recorded
    file, or a size the model was not trained at.
    """
    folder = find(name_or_path)
    config = _read_config(folder)
    card = _card(config, folder)
    if size is not None and size not in card.sizes:
        known = ", ".join(map(str, card.sizes))
        raise UserError(f"{card.id} was not trained at size {size}: use {known}, or give size to the call for timing.")
    weights = {file: _read_weights(folder, file, config["files"][file]["sha256"]) for file in card.files}
    if lina.is_lina(config):
        images = lina.build(config, weights)
        images.model.to(dtype)
        images.card = card
        return images.to(device)
    pipe = build(config, size or card.size) if is_emoji(config) else _clip_pipeline(config, card, size or card.size)
    _fill(pipe.transformer, weights[MODEL_FILE], folder / MODEL_FILE)
    table = {key.removeprefix("text."): value for key, value in weights[TEXT_FILE].items()}
    _fill(pipe.text, table, folder / TEXT_FILE)
    _cast(pipe.transformer, dtype)
    pipe.transformer.eval()
    pipe.text.eval()
    pipe.card = card
    return pipe.to(device)


def _clip_pipeline(config: dict[str, Any], card: Card, size: int) -> WorldPipeline:
    """A video model's pipeline with untrained weights."""
    from foveal.pipelines.world.pipeline import FlowMatchEulerDiscreteScheduler, TextTable, WanTransformer3DModel
    from foveal.pipelines.world.pipeline import WorldPipeline as Pipeline

    if tuple(config["words"]) != VOCAB:
        raise UserError(
            f"{card.folder / 'config.json'} lists other words than this version of foveal: use matching versions."
        )
    return Pipeline(
        WanTransformer3DModel(**config["transformer"]),
        TextTable(config["transformer"]["text_dim"]),
        FlowMatchEulerDiscreteScheduler(shift=config["shift"]),
        **{key: config[key] for key in ("frames", "steps", "guidance")},
        size=size,
        objects=card.objects,
        shifts={str(trained): shift for trained, shift in card.shifts},
    )


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a model: an explicit path, else the package, else FOVEAL_WEIGHTS_DIR."""
    path, names = Path(name_or_path), shipped()
    explicit = isinstance(name_or_path, os.PathLike) or "/" in str(name_or_path) or os.sep in str(name_or_path)
    if explicit or (str(path) not in names and (path / "config.json").is_file()):
        if not (path / "config.json").is_file():
            raise UserError(f"no model at {path}: a model folder holds config.json, {MODEL_FILE}, {TEXT_FILE}.")
        return path
    extra = os.environ.get(WEIGHTS_DIR)
    places = [ASSETS / path] + ([Path(extra) / path] if extra else [])
    found = [place for place in places if (place / "config.json").is_file()]
    if not found:
        close = difflib.get_close_matches(str(path), names, n=1, cutoff=0.0)
        hint = f" (nearest: {close[0]!r})" if close else ""
        raise UserError(f"unknown model {str(path)!r}{hint}: use one of {', '.join(names)}, or a folder's path.")
    complete = [place for place in found if _card(_read_config(place), place).available]
    return (complete or found)[0]


def config_of(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of a model, read and not loaded. Raises as `load` does."""
    return _read_config(find(name_or_path))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not (is_emoji(config) or lina.is_lina(config)):
            config["transformer"]["patch_size"] = tuple(config["transformer"]["patch_size"])
        return config
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a model's config ({error}): get the folder again.") from error


def _card(config: dict[str, Any], folder: Path) -> Card:
    if lina.is_lina(config):
        own = lina.card_facts(config)
    else:
        own = card_facts(config) if is_emoji(config) else _clip_facts(config)
        net = config["transformer"]
        own |= {"heads": net["num_attention_heads"], "head_dim": net["attention_head_dim"]}
    return Card(
        **{key: config[key] for key in ("id", "size", "steps", "guidance", "params")},
        sha256=config["files"][MODEL_FILE]["sha256"],
        folder=folder,
        **own,
    )


def _clip_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a video model's card that another kind of model has in its own way."""
    grid = token_grid(config["transformer"]["patch_size"], config["frames"], config["size"])
    shifts = config.get("shifts") or {str(config["size"]): config["shift"]}
    return {
        **{key: config[key] for key in ("frames", "shift")},
        "grid": grid,
        "tokens": grid[0] * grid[1] * grid[2],
        "layers": config["transformer"]["num_layers"],
        "objects": config.get("objects", 1),
        "world": config.get("world", 1),
        "shifts": tuple((int(size), float(shift)) for size, shift in shifts.items()),
    }


def _read_weights(folder: Path, name: str, sha256: str | None) -> dict[str, Tensor]:
    file = folder / name
    if not file.is_file():
        raise UserError(
            f"{file} is missing: reinstall foveal, train it with foveal.pipelines.train_world, "
            f"or set {WEIGHTS_DIR} to a directory that holds {folder.name}/{name}."
        )
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{file} is not the recorded file (SHA-256 {found[:12]}..., config.json says {str(sha256)[:12]}...): "
            "it is truncated or changed, get it again."
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}): get it again.") from error


def _fill(module: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    try:
        module.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not fit the architecture in its config.json: {reason}.") from error


def _cast(transformer: Any, dtype: torch.dtype) -> None:
    """Cast weights, but keep in fp32 what diffusers' own loader keeps in fp32."""
    if dtype == torch.float32:
        return
    keep = getattr(transformer, "_keep_in_fp32_modules", None) or ()
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if not any(part in keep for part in name.split(".")):
            tensor.data = tensor.data.to(dtype)
