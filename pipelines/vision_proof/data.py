"""Grey pictures of 28 x 28 pixels in IDX files, and batches of them enlarged on the device.

Letters: B batch, S pixels a side.

Notable choices
- Files are found by their names in any depth of a folder: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two of
  ``t10k``, with or without ``.gz``, as MNIST and Fashion-MNIST come.
- Pictures stay bytes on the device; scaling, mirroring and enlarging happen per batch and count as part of a step.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = {"train": "train", "test": "t10k"}
BYTES, IMAGES, LABELS = 8, 3, 1  # of the IDX header: type of the elements, number of axes
MEAN, DEVIATION = 0.286, 0.353  # of Fashion-MNIST's training pixels between 0 and 1


@dataclass(frozen=True)
class Pictures:
    """images uint8 [N, h, w], labels int64 [N]"""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> Pictures:
        return Pictures(self.images.to(device), self.labels.to(device))

    def first(self, n: int | None) -> Pictures:
        return self if n is None else Pictures(self.images[:n], self.labels[:n])


def read(folder: Path, part: str) -> Pictures:
    """part: "train" or "test". ValueError where the folder lacks a file, or a file is not what its name says."""
    stem = PARTS[part]
    images = read_idx(found(folder, f"{stem}-images-idx3-ubyte"), IMAGES)
    labels = read_idx(found(folder, f"{stem}-labels-idx1-ubyte"), LABELS)
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {part} images and {len(labels)} labels; give files of one set.")
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def found(folder: Path, name: str) -> Path:
    """The first file of that name, plain or compressed, anywhere below the folder."""
    for ending in (".gz", ""):
        for path in sorted(Path(folder).rglob(name + ending)):
            return path
    raise ValueError(f"there is no {name}.gz or {name} below {folder}; unpack MNIST or Fashion-MNIST there.")


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Bytes of an IDX file with that many axes."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * axes
    if len(raw) < start or tuple(raw[:4]) != (0, 0, BYTES, axes):
        raise ValueError(f"{path.name} is no IDX file of bytes with {axes} axes; download it again.")
    shape = struct.unpack(f">{axes}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path.name} should hold {shape} bytes and holds {len(raw) - start}; download it again.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def enlarged(images: Tensor, size: int, mirror: Tensor | None = None) -> Tensor:
    """uint8 [B, h, w] -> fp32 [B, 1, S, S], mean 0 and deviation 1, bilinear. ``mirror`` bool [B]: which to flip left to right."""
    x = (images[:, None].float() / 255 - MEAN) / DEVIATION
    if mirror is not None:
        x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
    return x if x.shape[-1] == size == x.shape[-2] else F.interpolate(x, (size, size), mode="bilinear")


class Batches:
    """Random batches of a training set, drawn with replacement; the same seed draws the same ones on one device."""

    def __init__(self, pictures: Pictures, batch: int, size: int, seed: int) -> None:
        self.pictures, self.batch, self.size = pictures, batch, size
        self.device = pictures.images.device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """-> images [B, 1, S, S], labels [B]"""
        at = torch.randint(len(self.pictures), (self.batch,), device=self.device, generator=self.generator)
        mirror = torch.rand(self.batch, device=self.device, generator=self.generator) < 0.5
        return enlarged(self.pictures.images[at], self.size, mirror), self.pictures.labels[at]
