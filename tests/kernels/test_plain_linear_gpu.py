"""Linear attention without order on a GPU: calls like one before, streams and graphs, and every shape that changes a tile."""

import pytest
import torch
from torch import Tensor

from foveal.kernels.gated_linear import linear_attention
from foveal.kernels.gated_linear.plain import projected_linear_attention

pytestmark = pytest.mark.gpu
BOUND = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def draw(
    seed: int, n: int, heads: int, width: int, dtype: torch.dtype, gated: bool, batch: int = 2
) -> tuple[Tensor, dict]:
    torch.manual_seed(seed)
    gates = [torch.rand(1, heads, n, 1, device="cuda").to(dtype) + 0.5 if gated else None for _ in range(2)]
    added = torch.randn(batch, n - n // 5, heads * width, device="cuda").to(dtype) if gated else None
    qkv = torch.randn(batch, n, 3 * heads * width, device="cuda").to(dtype)
    return qkv, {"key_gate": gates[0], "value_gate": gates[1], "added": added}


def exactly(qkv: Tensor, heads: int, more: dict, normalisation: str = "division") -> Tensor:
    wide = {name: None if x is None else x.double() for name, x in more.items()}
    return projected_linear_attention(qkv.double(), heads, normalisation=normalisation, **wide)


@pytest.mark.parametrize("normalisation", ["division", "subtraction"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", BOUND, ids=lambda x: str(x).replace("torch.", ""))
@pytest.mark.parametrize(("heads", "width", "n"), [(16, 72, 1111), (3, 64, 5000), (40, 96, 130), (2, 128, 70)])
@torch.no_grad()
def test_every_call_equals_double_precision_and_gives_the_same_bits_again(heads, width, n, dtype, gated, normalisation):
    for seed in range(3):
        qkv, more = draw(seed, n, heads, width, dtype, gated)
        out = projected_linear_attention(qkv, heads, normalisation=normalisation, **more)
        assert relative(out, exactly(qkv, heads, more, normalisation)) < BOUND[dtype]
        assert torch.equal(out, projected_linear_attention(qkv, heads, normalisation=normalisation, **more))


@torch.no_grad()
def test_views_and_projections_give_the_same_bits():
    for seed in range(3):
        qkv, more = draw(seed, 700, 4, 72, torch.bfloat16, False)
        q, k, v = qkv.unflatten(-1, (3, 4, 72)).permute(2, 0, 3, 1, 4)
        whole = projected_linear_attention(qkv, 4, **more)
        assert torch.equal(linear_attention(q, k, v).transpose(1, 2).flatten(2), whole)


@torch.no_grad()
def test_a_graph_of_calls_reads_what_is_there_when_it_is_replayed():
    qkv, more = draw(0, 1280, 16, 96, torch.bfloat16, True)
    call = lambda: projected_linear_attention(qkv, 16, **more)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in (1, 2):
        qkv.copy_(draw(seed, 1280, 16, 96, torch.bfloat16, True)[0])
        graph.replay()
        assert torch.equal(out, call())


@torch.no_grad()
def test_a_tensor_off_the_grid_of_16_bytes_is_another_kind():
    qkv, more = draw(0, 300, 2, 64, torch.bfloat16, False)
    for at in (0, 1, 0, 1):
        moved = torch.empty(qkv.numel() + 8, device="cuda", dtype=qkv.dtype)[at : at + qkv.numel()].view(qkv.shape)
        moved.copy_(qkv)
        assert relative(projected_linear_attention(moved, 2, **more), exactly(qkv, 2, more)) < BOUND[torch.bfloat16]
