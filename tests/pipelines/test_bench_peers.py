"""Other packages' kernels: absent ones are not listed, ones that do not load are rows that failed, lists reach them unchanged."""

import sys

import pytest
import torch
import torch.nn.functional as F

from foveal.kernels.block_sparse import block_sparse_attention
from foveal.kernels.gated_linear import gated_linear_attention
from foveal.pipelines.bench import cases, competitors, peers, sparse
from foveal.pipelines.bench.rounds import interleaved

CPU = torch.device("cpu")
CASE = cases.Case(name="c", tokens=500, heads=2, head_dim=16, spread=0.5)


@pytest.fixture
def qkv():
    return sparse.draw(CASE.tokens, CASE.heads, CASE.head_dim, CPU, torch.float32)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package that can be found by name; it leaves the interpreter again."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            for folder in path.relative_to(tmp_path).parents:
                if folder.name:
                    (tmp_path / folder / "__init__.py").touch()

    yield make
    for name in [n for n in sys.modules if n.split(".")[0] in ("flash_attn", "xformers", "fla")]:
        del sys.modules[name]


FLASH4 = """
import torch
from typing import Any, NamedTuple

class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Any
    mask_block_idx: Any
    full_block_cnt: Any = None
    full_block_idx: Any = None
    block_size: Any = None
"""
FLASH4_FUNC = """
import torch
import torch.nn.functional as F

def flash_attn_func(q, k, v, softmax_scale=None, block_sparse_tensors=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if block_sparse_tensors is not None:
        t = block_sparse_tensors
        assert int(t.mask_block_cnt.sum()) == 0 and t.mask_block_idx.shape[:3] == t.full_block_idx.shape[:3]
        rows, cols = t.block_size
        mask = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
        for h in range(q.shape[1]):
            for r in range(t.full_block_cnt.shape[2]):
                for c in t.full_block_idx[0, h, r, : int(t.full_block_cnt[0, h, r])].tolist():
                    mask[:, h, r * rows : (r + 1) * rows, c * cols : (c + 1) * cols] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale).transpose(1, 2), None
"""


def fake_flash4(package):
    package({"flash_attn/cute/block_sparsity.py": FLASH4, "flash_attn/cute/__init__.py": FLASH4_FUNC})


def test_peers_that_are_not_installed_are_not_listed(qkv, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda *_: False)
    plan = sparse.random_plan(CASE, 0.5, CPU)
    gate = torch.zeros(1, 2, CASE.tokens)
    listed = peers.flash4(*qkv), peers.flash4_sparse(*qkv, plan), peers.xformers(*qkv), peers.fla(*qkv, gate)
    assert listed == ({}, {}, {}, {})


def test_a_package_is_found_without_being_imported(package):
    package({"fla/ops/gla.py": "raise ImportError('not for this machine')", "xformers/ops.py": ""})
    assert peers.installed("fla") and "fla" not in sys.modules
    assert not peers.installed("flash_attn_that_nobody_has", "cute")
    assert peers.installed("xformers", "ops.py") and not peers.installed("xformers", "cute")


def test_a_peer_that_does_not_load_is_a_failure_with_its_reason(qkv, package):
    package({"xformers/ops.py": "raise ImportError('built for another torch')"})
    rounds = interleaved({"fine": lambda: None, **peers.xformers(*qkv)}, CPU, rounds=1)
    assert rounds.failed == {"xformers": "ImportError: built for another torch"} and list(rounds.timings) == ["fine"]


def test_flash4_sees_the_same_lists(qkv, package):
    fake_flash4(package)
    plan = sparse.random_plan(CASE, 0.5, CPU)
    (call,) = peers.flash4_sparse(*qkv, plan).values()
    torch.testing.assert_close(call(), block_sparse_attention(*qkv, plan))


def test_flash4_dense_gives_the_layout_of_the_others(qkv, package):
    fake_flash4(package)
    (call,) = peers.flash4(*qkv).values()
    torch.testing.assert_close(call(), F.scaled_dot_product_attention(*qkv))


@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_fla_gets_tokens_before_heads(gate, package, qkv):
    width = (CASE.head_dim,) if gate == "vector" else ()
    log_gate = -torch.rand(1, CASE.tokens, CASE.heads, *width).transpose(1, 2)
    kernel, place = ("chunk_gla", "gla") if gate == "vector" else ("chunk_simple_gla", "simple_gla")
    text = (
        "from foveal.kernels.gated_linear import gated_linear_attention\n"
        f"def {kernel}(*tensors):\n"
        "    return gated_linear_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2), None\n"
    )
    package({f"fla/ops/{place}.py": text})
    ((name, call),) = peers.fla(*qkv, log_gate).items()
    assert name == f"fla {kernel}"
    torch.testing.assert_close(call(), gated_linear_attention(*qkv, log_gate))


def test_flex_attention_gets_the_same_lists():
    plan = sparse.random_plan(CASE, 0.5, CPU)
    lists = competitors.full_blocks(plan, 1, CASE.heads)
    assert lists.shape == (1, CASE.heads, CASE.tokens, CASE.tokens) and lists.BLOCK_SIZE == (128, 128)
    assert torch.equal(lists.to_dense().bool(), plan.visits())
    assert int(lists.kv_num_blocks.sum()) == 0  # full blocks only: no mask function runs
