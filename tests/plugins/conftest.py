"""Offline, one thread, and the tiny models importable by name."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    """No graphs of other tests, and no trace log."""
    from compiling import quiet_compiler

    with quiet_compiler():
        torch.compiler.reset()
        yield
        torch.compiler.reset()
