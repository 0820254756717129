"""Compiling the gated kernels for chips that are not here, their tiles, and what calls cost."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveal.kernels.block_sparse.tiles import SHARED_EVERYWHERE
from foveal.kernels.gated_linear import bidirectional_gated_linear_attention
from foveal.kernels.gated_linear.counting import bytes_moved, multiply_adds, register
from foveal.kernels.gated_linear.tiles import tile_for

CAPABILITIES = (80, 86, 89, 90, 120)


@pytest.mark.slow
def test_every_chip_compiles_within_99_kb():
    # A process of its own: here Triton's interpreter stands in for its compiler.
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "foveal.kernels.gated_linear.compiling", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["capability"] for row in found} == set(CAPABILITIES)
    for row in found:
        assert row["shared"] <= SHARED_EVERYWHERE, row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (16, 32), (32, 64), (72, 72), (128, 128)])
@pytest.mark.parametrize("directions", [1, 2])
def test_every_call_has_tile_sizes_without_tuning(dtype, backward, vector, keys, values, directions):
    tile = tile_for(dtype, keys, values, vector, backward, directions)
    for size, most in ((tile.C, 64), (tile.BK, 2 * keys), (tile.BV, 2 * values)):
        assert size & (size - 1) == 0 and 16 <= size <= max(16, most)


def test_missing_tile_sizes_are_named():
    with pytest.raises(ValueError, match=r"add a row to configs.json"):
        tile_for(torch.bfloat16, 256, 64, True)


def test_counted_work_is_that_of_the_paper():
    assert multiply_adds(1, 1, 1, 32, 64, 1, 64) == 2 * 32 * 64 + 64 * 96 == 10240
    assert multiply_adds(1, 1, 1, 32, 64, 2, 64) == 16384
    assert bytes_moved(1, 1, 1, 32, 64, directions=2) == 2 * 192 + 256


def test_pytorch_counts_the_operator():
    register(), register()
    x = [torch.randn(1, 2, 16, 16) for _ in range(5)]
    with FlopCounterMode(display=False) as counter:
        bidirectional_gated_linear_attention(*(t.requires_grad_() for t in x), implementation="triton").sum().backward()
    assert counter.get_total_flops() == 7 * multiply_adds(1, 2, 16, 16, 16, 2)
