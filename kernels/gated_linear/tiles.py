"""Which tile sizes the gated kernels take, read from ``configs.json``, so that a first call tunes nothing."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Tile:
    """C tokens of a chunk, BK key channels of a tile (both powers of two, at least 16), warps of a program."""

    C: int
    BK: int
    warps: int

    @property
    def levels(self) -> int:
        return self.C.bit_length() - 1


def padded(width: int) -> int:
    """A power of two, at least 16: what a matrix product needs."""
    return max(16, 1 << (width - 1).bit_length())


@functools.lru_cache(maxsize=1)
def _rows() -> list[dict]:
    return json.loads(resources.files("foveal.kernels.gated_linear").joinpath("configs.json").read_text())["rows"]


@functools.lru_cache(maxsize=64)
def tile_for(element_bytes: int, keys: int, values: int, vector: bool, backward: bool = False) -> Tile:
    """keys, values: their widths. vector: a gate per key channel. The backward makes its states again, in chunks of its own."""
    width, gate = max(padded(keys), padded(values)), "vector" if vector else "scalar"
    wanted = {"pass": "backward" if backward else "forward", "bytes": element_bytes, "gate": gate}
    for row in _rows():
        if row["width"] >= width and wanted.items() <= row.items():
            return Tile(row["C"], min(row["BK"], padded(keys)), row["warps"])
    raise ValueError(
        f"no tile sizes for {element_bytes}-byte elements with widths {keys} and {values}; add a row to configs.json."
    )
