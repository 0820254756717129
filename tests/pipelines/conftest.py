"""The tiny untrained model of the world, importable by name and as a fixture."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """As on a CPU without Triton's interpreter, which is exact and slow; one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foveal.kernels.block_sparse.needs.INTERPRETED", False)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with random weights in the format of the shipped models."""
    from tiny_world import make_model

    return make_model(tmp_path_factory.mktemp("model"))
