"""Which tile sizes the gated kernels take, read from ``configs.json``, so that a first call tunes nothing."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

import torch


@dataclass(frozen=True)
class Tile:
    """C tokens of a chunk, BK key and BV value channels of a tile (powers of two, at least 16), warps of a program."""

    C: int
    BK: int
    BV: int
    warps: int


def padded(width: int) -> int:
    """A power of two, at least 16: what a matrix product needs."""
    return max(16, 1 << (width - 1).bit_length())


@functools.lru_cache(maxsize=1)
def _rows() -> list[dict]:
    return json.loads(resources.files("foveal.kernels.gated_linear").joinpath("configs.json").read_text())["rows"]


@functools.lru_cache(maxsize=64)
def tile_for(
    dtype: torch.dtype, keys: int, values: int, vector: bool, backward: bool = False, directions: int = 1
) -> Tile:
    """keys, values: their widths. vector: a gate per key channel. The backward makes its states again, in chunks of its own."""
    width = max(padded(keys), padded(values))
    facts = {
        "pass": "backward" if backward else "forward", "dtype": str(dtype).removeprefix("torch."),
        "gate": "vector" if vector else "scalar", "directions": directions,
    }  # fmt: skip
    for row in _rows():
        if row["width"] >= width and all(row.get(name, fact) == fact for name, fact in facts.items()):
            return Tile(row["C"], min(row["BK"], padded(keys)), min(row["BV"], padded(values)), row["warps"])
    raise ValueError(f"no tile sizes for {facts['dtype']} with widths {keys} and {values}; add a row to configs.json.")
