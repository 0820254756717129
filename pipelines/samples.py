"""A run folder on disk: samples, small records, and the promise that finished work is never lost or overwritten.

T frames, H height, W width.

    config.yaml                                        the resolved config
    media/<method>/<prompt>-<seed>.safetensors         video uint8 [T, H, W, 3], its facts as JSON in the header
    media/<method>/<prompt>-<seed>.webp                the same, animated, for eyes
    work/<key>.json                                    timings, step errors, noise floors: what a continued run need not repeat

Notable choices
- Every file is written beside its place and then renamed: a file that exists is whole.
- A sample carries the fingerprint of what made it (config, weights, method); one that does not match is an error.
- Metrics are computed from the 8-bit video in the file, so anyone can compute them again from the folder.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveal.pipelines.errors import UserError

FPS = 8
LOSSLESS_UP_TO = 256


@dataclass(frozen=True, order=True)
class Cell:
    """One place of the design: prompt index and seed."""

    prompt: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.prompt}-{self.seed}"


@dataclass(frozen=True)
class Sample:
    """A finished sample: video uint8 [T, H, W, 3], final latents or None, and what was recorded while it was made."""

    video: Tensor
    latents: Tensor | None
    facts: dict[str, Any]


def atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, atomically."""
    atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Store:
    """The folder of one study. `fingerprint` names the config and the weights; every file carries it."""

    folder: Path
    fingerprint: str

    def path(self, method: str, cell: Cell) -> Path:
        return self.folder / "media" / method / f"{cell.name}.safetensors"

    def has(self, method: str, cell: Cell) -> bool:
        """Whether the sample is finished; raises for one that something else made."""
        path = self.path(method, cell)
        if not path.is_file():
            return False
        self._facts(path)
        return True

    def save(self, method: str, cell: Cell, sample: Sample) -> None:
        """Write the sample and its animation."""
        path = self.path(method, cell)
        tensors = {"video": sample.video.contiguous()}
        if sample.latents is not None:
            tensors["latents"] = sample.latents.contiguous()
        facts = json.dumps({**sample.facts, "fingerprint": self.fingerprint})
        atomic(path.with_suffix(".webp"), lambda p: write_webp(p, sample.video))
        atomic(path, lambda p: save_file(tensors, p, metadata={"foveal": facts}))

    def load(self, method: str, cell: Cell) -> Sample:
        """Read a finished sample."""
        path = self.path(method, cell)
        facts = self._facts(path)
        with safe_open(path, framework="pt") as file:
            latents = file.get_tensor("latents") if "latents" in file.keys() else None  # noqa: SIM118
            return Sample(file.get_tensor("video"), latents, facts)

    def _facts(self, path: Path) -> dict[str, Any]:
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("foveal", "{}"))
        except Exception as err:
            raise UserError(f"{path} is not a readable sample ({err}); delete it and run again.") from err
        if facts.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"{path} was made by another config or other weights; give another output folder, or delete {self.folder}."
            )
        return facts

    # ---- small records
    def note(self, key: str, value: Any) -> Any:
        """Keep a JSON value under a key. Returns it as JSON gives it back."""
        path = self._note_path(key)
        write_text(path, json.dumps({"fingerprint": self.fingerprint, "value": value}))
        return self.noted(key)

    def noted(self, key: str) -> Any | None:
        """The value kept under a key by this same config, or None."""
        path = self._note_path(key)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        return record["value"] if record.get("fingerprint") == self.fingerprint else None

    def _note_path(self, key: str) -> Path:
        return self.folder / "work" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', key)}.json"


def open_folder(folder: Path, config_text: str, same: Callable[[str], str | None]) -> None:
    """Claim an output folder for a config, or go on with it.

    `same(existing_text)` says in words how an existing config differs, or None. Raises UserError for a folder that belongs
    to another config, or that holds files and no config; nothing in it is touched.
    """
    path = folder / "config.yaml"
    if path.is_file() and any(
        entry != path for entry in folder.iterdir()
    ):  # a claim that produced nothing binds nobody
        difference = same(path.read_text(encoding="utf-8"))
        if difference is not None:
            raise UserError(
                f"{folder} holds a run of another config ({difference}); give another folder with output=..., or delete it."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(entry != path for entry in folder.iterdir())):
        raise UserError(f"{folder} exists and is not a run folder; give another folder with output=...")
    try:
        write_text(path, config_text)
    except OSError as err:
        raise UserError(f"cannot write into {folder} ({err.strerror}); give another folder with output=...") from err


def to_uint8(frames: Tensor) -> Tensor:
    """[T, 3, H, W] in [0, 1] -> uint8 [T, H, W, 3] on the CPU."""
    return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def to_float(video: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [1, T, 3, H, W] in [0, 1]."""
    return (video.permute(0, 3, 1, 2).float() / 255)[None]


def write_webp(path: Path, video: Tensor) -> None:
    """An animated WebP of uint8 [T, H, W, 3]; lossless for small frames."""
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in video]
    lossless = max(video.shape[1:3]) <= LOSSLESS_UP_TO
    images[0].save(
        path, format="WEBP", save_all=True, append_images=images[1:], duration=1000 // FPS, loop=0,
        lossless=lossless, quality=90, method=2,
    )  # fmt: skip
