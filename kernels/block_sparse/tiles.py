"""Which tile sizes the portable kernel takes: read from ``configs.json``, so that a first call tunes nothing."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

SHARED_EVERYWHERE = 99 * 1024  # bytes of shared memory that every supported chip gives one program


@dataclass(frozen=True)
class Tile:
    """BM query rows, BN keys, warps and pipeline stages of one program."""

    BM: int
    BN: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=1)
def _rows() -> list[dict[str, int]]:
    text = resources.files("foveal.kernels.block_sparse").joinpath("configs.json").read_text()
    return json.loads(text)["rows"]


def padded(head_dim: int) -> int:
    """The head dim in the kernel: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.lru_cache(maxsize=64)
def tile_for(capability: int, shared: int, element_bytes: int, head_dim: int) -> Tile:
    """capability: 10 * major + minor, e.g. 90. shared: bytes a program may use. element_bytes: 2 or 4."""
    dim = padded(head_dim)
    for row in _rows():
        fits = row["capability"] <= capability and row.get("shared", SHARED_EVERYWHERE) <= shared
        if fits and row["bytes"] == element_bytes and row["dim"] >= dim:
            return Tile(row["BM"], row["BN"], row["warps"], row["stages"])
    raise ValueError(
        f"no tile sizes for capability {capability} with {shared} bytes of shared memory, {element_bytes}-byte elements and head_dim "
        f"{head_dim}; add a row to configs.json."
    )
