"""The portable kernel compiles for every chip it ships for, within the shared memory that all of them have. No GPU needed."""

import json
import os
import subprocess
import sys

import pytest

from foveal.kernels.block_sparse.tiles import SHARED_EVERYWHERE, tile_for

CAPABILITIES = (80, 86, 89, 90, 120)


@pytest.mark.slow
def test_every_chip_compiles_within_99_kb():
    # A process of its own: here Triton's interpreter stands in for its compiler.
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "foveal.kernels.block_sparse.compiling"],
        capture_output=True,
        text=True,
        env=env,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["capability"] for row in found} == set(CAPABILITIES)
    for row in found:
        assert row["shared"] <= SHARED_EVERYWHERE, row


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 128, 256])
def test_every_call_has_tile_sizes_without_tuning(capability, element_bytes, head_dim):
    assert tile_for(capability, SHARED_EVERYWHERE, element_bytes, head_dim).BM >= 16


def test_a_chip_with_more_shared_memory_gets_a_larger_tile():
    assert tile_for(90, 232448, 2, 128) != tile_for(90, SHARED_EVERYWHERE, 2, 128)


def test_missing_tile_sizes_are_named():
    with pytest.raises(ValueError, match=r"add a row to configs.json"):
        tile_for(70, SHARED_EVERYWHERE, 2, 64)
