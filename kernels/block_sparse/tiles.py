"""Which tile sizes a kernel takes: the portable one's are read from ``configs.json``, so that a first call tunes nothing.

Letters as in plan.py.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.block_sparse.plan_forms import cell_width

# Measured speed of a full tile relative to dense attention, by implementation and keys of a tile (H100, 128-token blocks).
SPEED = {"hopper": {128: 1.0, 64: 0.85}, "triton": {64: 0.7}}
SPECIALISED_BLOCKS = 16  # fewer key blocks than this are not worth compiling a variant of their own
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


def fill(length: int, tile: int) -> float:
    """Used share of the tiles that a block of ``length`` positions takes."""
    return length / (-(-length // tile) * tile) if length else 1.0


def worth(name: str, plan: BlockPlan, keys: int) -> float:
    """Expected speed on this plan, in units of dense attention per pair: the tile's speed times the used share of tiles."""
    if name == "hopper":  # a consumer without rows still holds up the other one: counted twice
        return SPEED[name][keys] * fill(plan.max_q_len, 128) ** 2 * fill(plan.max_kv_len, keys)
    return SPEED[name][keys] * fill(plan.max_q_len, 64) * fill(plan.max_kv_len, keys)


def hopper_keys(plan: BlockPlan) -> int:
    """Keys of a tile of the Hopper kernel: 64 where masks or biases need registers, or blocks are short; else 128."""
    if cell_width(plan, 128):
        return 128
    if plan.has_pair_masks or plan.block_bias is not None or plan.key_bias is not None:
        return 64
    return 64 if worth("hopper", plan, 64) > worth("hopper", plan, 128) else 128


def row_table(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int, int, int] | None:
    """[B, H, N, D] as rows of one 2-D table -> (rows, columns, rows from batch to batch, rows and columns from head to head), or None."""
    (b, h, n, d), (s_b, s_h, s_n, s_d) = shape, stride
    if s_d != 1 or s_n % 8 or not n:
        return None
    row_b = 0 if b == 1 else s_b // s_n
    if b > 1 and s_b % s_n:
        return None
    if h == 1 or (s_h < s_n and (h - 1) * s_h + d <= s_n):  # heads beside each other
        col_h = 0 if h == 1 else s_h
        return (b - 1) * row_b + n, (h - 1) * col_h + d, row_b, 0, col_h
    if s_h % s_n:
        return None
    return (b - 1) * row_b + (h - 1) * (s_h // s_n) + n, d, row_b, s_h // s_n, 0
