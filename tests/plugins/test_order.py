"""Laws of token orders."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

from foveal.plugins.order import axis_tiles, order_of
from foveal.plugins.site import MethodError

CASES = [
    ((7, 10), (2, 4), None),
    ((5, 6, 9), (2, 3, 5), None),
    ((8, 6, 10), (4, 8, 8), None),
    ((11, 9, 10), (3, 5, 8), None),
    ((12,), (5,), None),
    ((11,), (2,), (3,)),
    ((7, 10), (2, 2), (2, 3)),
    ((5, 6, 9), (2, 2, 2), (1, 2, 4)),
    ((1, 6, 9), (1, 4, 4), None),
    ((1,), (4,), None),
]


def literal_order(grid, tile, dilation):
    """Sort tokens by residue class, then tile, then offset, straight from the definition."""
    tokens = list(itertools.product(*map(range, grid)))

    def key(x):
        return (
            [a % d for a, d in zip(x, dilation, strict=True)],
            [a // d // t for a, d, t in zip(x, dilation, tile, strict=True)],
            [a // d % t for a, d, t in zip(x, dilation, tile, strict=True)],
        )  # fmt: skip

    return sorted(range(len(tokens)), key=lambda i: key(tokens[i]))


@pytest.mark.parametrize("grid, tile, dilation", CASES)
def test_order_is_the_literal_sort(grid, tile, dilation):
    order = order_of(grid, tile, dilation)
    assert order.token.tolist() == literal_order(grid, tile, dilation or (1,) * len(grid))


@pytest.mark.parametrize(
    "grid, tile, dilation", [*CASES, ((30, 48, 80), (4, 8, 8), (2, 5, 4)), ((33, 45, 80), (3, 5, 8), None)]
)
def test_permutation_round_trip_is_bit_exact(grid, tile, dilation):
    order = order_of(grid, tile, dilation)
    n = math.prod(grid)
    assert torch.equal(order.token.sort().values, torch.arange(n))
    assert torch.equal(order.token[order.inverse], torch.arange(n))
    x = torch.randn(2, n, 3)
    assert torch.equal(order.restore(order.permute(x)), x)
    assert torch.equal(order.restore(order.permute(x.mT, dim=-1), dim=-1), x.mT)
    assert torch.equal(order.permute(x)[:, 5 % n], x[:, order.token[5 % n]])


@pytest.mark.parametrize("grid, tile, dilation", CASES)
def test_every_run_is_one_box_of_one_residue_class(grid, tile, dilation):
    order = order_of(grid, tile, dilation)
    dilation = dilation or (1,) * len(grid)
    where = np.indices(grid).reshape(len(grid), -1).T[order.token.numpy()]
    assert int(order.length.sum()) == math.prod(grid)
    assert order.start.tolist() == [0, *order.length.cumsum(0)[:-1].tolist()]
    for start, length in zip(order.start.tolist(), order.length.tolist(), strict=True):
        cells = where[start : start + length]
        for a, d in enumerate(dilation):
            values = np.unique(cells[:, a])
            assert len(values) <= tile[a] and len(set(values % d)) == 1 and set(np.diff(values)) <= {d}
        assert length == math.prod(len(np.unique(cells[:, a])) for a in range(len(grid)))


def test_divisible_order_is_the_view_and_permute():
    grid, tile = (6, 10, 8), (3, 5, 4)
    view = torch.arange(480).view(2, 3, 2, 5, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1)
    assert torch.equal(order_of(grid, tile).token, view)


def test_coordinates_are_class_positions_and_the_class():
    order = order_of((7, 10), (2, 2), (2, 3))
    y, x = order.token // 10, order.token % 10
    assert order.coord.dtype == torch.int16
    assert torch.equal(order.coord.long(), torch.stack([y // 2, x // 3, (y % 2) * 3 + x % 3]))
    assert order_of((7, 10), (2, 2)).coord.shape == (2, 70)


def test_one_axis_keeps_its_order_and_two_do_not():
    assert order_of((12,), (5,)).identity
    assert order_of((1, 12), (1, 5)).identity
    assert order_of((4, 12), (2, 12)).identity
    assert not order_of((4, 12), (2, 5)).identity
    assert not order_of((12,), (5,), (2,)).identity


def test_shift_makes_the_first_tile_shorter():
    assert order_of((10,), (4,), shift=(1,)).length.tolist() == [3, 4, 3]
    tiles = axis_tiles(10, 4, shift=3)
    assert (tiles.start.tolist(), tiles.stop.tolist()) == ([0, 1, 5, 9], [1, 5, 9, 10])


def test_equal_numbers_give_the_same_object():
    assert order_of((7, 10), (2, 4)) is order_of([7, 10], [2, 4])
    assert order_of((7, 10), (2, 4)).on("cpu") is order_of((7, 10), (2, 4))
    assert order_of((7, 10), (2, 4)).tiles == (4, 3)


def test_large_orders_are_quick():
    start = time.perf_counter()
    order_of((33, 45, 80), (3, 5, 7))
    order_of((256, 256), (16, 9))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "grid, tile, dilation, words",
    [
        ((2, 2, 2, 2), (1, 1, 1, 1), None, "4 axes"),
        ((4, 4), (2,), None, "needs 2"),
        ((4, 4), (2, 0), None, "at least 1"),
        ((4, True), (2, 2), None, "whole numbers"),
        ((4, 4), (2, 2), (5, 1), "must not exceed"),
        ((40000,), (2,), None, "int16"),
    ],
)
def test_impossible_orders_are_refused_in_one_sentence(grid, tile, dilation, words):
    with pytest.raises(MethodError, match=words):
        order_of(grid, tile, dilation)
