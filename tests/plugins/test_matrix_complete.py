"""The composition matrix, all of it: hosts x conditions x orders x methods. Run with ``make test-matrix``."""

import pytest
from test_matrix import check, tried
from tiny_pipes import METHODS

from foveal.plugins.diffusers_host.composition import cells

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore")]
CELLS = tried()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("host", "condition", "order"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_the_cell_is_what_the_data_say(host, condition, order, method):
    check(host, condition, order, method)


def test_every_working_cell_is_run():
    assert {(h, c, o) for h, c, o, v in cells() if v.outcome == "works"} <= set(CELLS)
