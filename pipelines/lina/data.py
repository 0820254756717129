"""Pictures with classes, from files that the caller names: nothing is downloaded and nothing here ships.

N pictures, S pixels of a side of the network's picture.

Notable choices
- The network's pictures are [1, S, S] in [-1, 1]: those of 28 pixels are padded with black to 32, or averaged down to 8.
- Training pictures split once: the last ones are kept from the judge, so that real pictures can be judged like samples.
- "tiny" are shapes drawn from the seed, for tests; "digits" need scikit-learn, which is no dependency.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("square", "cross", "bar", "corners")
CLASSES = {"fashion": FASHION, "digits": DIGITS, "tiny": SHAPES}
FILES = {"train": "train", "test": "t10k"}
KEPT = 6  # one in so many training pictures is kept from the judge


@dataclass(frozen=True)
class Pictures:
    """images uint8 [N, S, S], labels int64 [N], of one split."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Pictures:
        return Pictures(self.images.to(device), self.labels.to(device))

    def part(self, start: int, stop: int) -> Pictures:
        return Pictures(self.images[start:stop], self.labels[start:stop])


@dataclass(frozen=True)
class Data:
    """classes: their names; train: for the generator; test: the reference, which nothing is trained on."""

    classes: tuple[str, ...]
    train: Pictures
    test: Pictures

    @property
    def for_judge(self) -> Pictures:
        return self.train.part(0, len(self.train) - len(self.train) // KEPT)

    @property
    def unseen_by_judge(self) -> Pictures:
        return self.train.part(len(self.train) - len(self.train) // KEPT, len(self.train))

    def to(self, device: torch.device) -> Data:
        return Data(self.classes, self.train.to(device), self.test.to(device))


def to_network(images: Tensor) -> Tensor:
    """uint8 [N, S, S] -> fp32 [N, 1, S, S] in [-1, 1]"""
    return images[:, None].float() / 127.5 - 1


def to_pictures(x: Tensor, size: int) -> Tensor:
    """fp32 [N, 1, S, S] in about [-1, 1] -> [N, 1, size, size] in [0, 1], the border cut off"""
    border = (x.shape[-1] - size) // 2
    x = x[..., border : border + size, border : border + size] if border else x
    return (x.float().clamp(-1, 1) + 1) / 2


def load_data(kind: str, folder: Path | None, side: int) -> Data:
    """Pictures of one kind with S = side. Raises ValueError in one sentence for what is not there."""
    if kind == "fashion":
        splits = {split: fashion(folder, prefix, side) for split, prefix in FILES.items()}
    elif kind == "digits":
        splits = digits(side)
    else:
        splits = {"train": shapes(600, side, 0), "test": shapes(200, side, 1)}
    return Data(CLASSES[kind], **splits)


def fashion(folder: Path | None, prefix: str, side: int) -> Pictures:
    """One split of Fashion-MNIST from its two IDX files, anywhere below a folder."""
    found = {}
    for part in ("images-idx3", "labels-idx1"):
        name = f"{prefix}-{part}-ubyte.gz"
        paths = sorted(folder.rglob(name)) if folder is not None and folder.is_dir() else []
        if not paths:
            raise ValueError(
                f"there is no {name} below {folder}; give --data the folder that holds Fashion-MNIST's four files."
            )
        found[part] = idx(paths[0])
    images = torch.from_numpy(found["images-idx3"])
    return Pictures(fitted(images, side), torch.from_numpy(found["labels-idx1"]).long())


def idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes. Raises ValueError when it is something else."""
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 8 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes; get it again.")
    shape = np.frombuffer(raw, ">i4", raw[3], 4).astype(int)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != shape.prod():
        raise ValueError(f"{path} is cut off: {values.size} of {shape.prod()} bytes; get it again.")
    return values.reshape(shape).copy()


def fitted(images: Tensor, side: int) -> Tensor:
    """uint8 [N, s, s] -> [N, side, side]: padded with black, or padded to a multiple of side and averaged."""
    factor = -(-images.shape[-1] // side)
    border = (factor * side - images.shape[-1]) // 2
    images = F.pad(images, (border,) * 4)
    if factor == 1:
        return images
    return torch.cat(
        [F.avg_pool2d(part[:, None].float(), factor)[:, 0].round().byte() for part in images.split(10_000)]
    )


def digits(side: int) -> dict[str, Pictures]:
    """The 8 x 8 digits inside scikit-learn, one in six for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise ValueError("the recipe digits reads scikit-learn's pictures, and scikit-learn is not installed.") from err
    if side != 8:
        raise ValueError(f"the digits are 8 x 8 pixels and the model makes {side}; use the recipe digits.")
    found = load_digits()
    images = torch.from_numpy(found.images * (255 / 16)).round().byte()
    labels = torch.from_numpy(found.target).long()
    test = torch.arange(len(labels)) % KEPT == 0
    return {"train": Pictures(images[~test], labels[~test]), "test": Pictures(images[test], labels[test])}


def shapes(n: int, side: int, seed: int) -> Pictures:
    """Four bright shapes of half the side, at any place, on black."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(SHAPES)
    edge = side // 2
    line = torch.arange(edge)
    middle = (line - (edge - 1) / 2).abs() < edge / 4
    border = (line == 0) | (line == edge - 1)
    masks = [
        torch.ones(edge, edge, dtype=torch.bool),
        middle[:, None] | middle,
        middle.expand(edge, -1),
        border[:, None] & border,
    ]
    images = torch.zeros(n, side, side, dtype=torch.uint8)
    for i, (row, column) in enumerate(torch.randint(side - edge + 1, (n, 2), generator=rng).tolist()):
        light = 155 + int(torch.randint(100, (), generator=rng))
        images[i, row : row + edge, column : column + edge] = masks[int(labels[i])] * light
    return Pictures(images, labels)
