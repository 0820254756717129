"""What laws about a GPU are checked with: a CUDA graph of a call, a guard against waiting for the device, errors of sampled rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The call as a CUDA graph, and the outputs that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """An error for everything in PyTorch that makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def tensors(x: Any) -> list[Tensor]:
    """All tensors of an output."""
    return [x] if isinstance(x, Tensor) else [t for part in x for t in tensors(part)]


def renew(*inputs: Tensor, seed: int = 7) -> None:
    """Other values in the same memory."""
    gen = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn(x.shape, device=x.device, generator=gen))


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))


def uniform_plan(n: int, count: Tensor, block: int = 128, seed: int = 0) -> BlockPlan:
    """Random lists over blocks of ``block`` tokens, the last one cut. count: int [Bm, Hm, R]. On the CPU."""
    start = torch.arange(0, n, block, dtype=torch.int32)
    c, width = start.numel(), max(1, int(count.max()))
    gen = torch.Generator().manual_seed(seed)
    # distinct blocks: a random first one, then steps of one stride that has no factor in common with c
    stride = next(s for s in range(max(1, c // 3), c + 1) if torch.gcd(torch.tensor(s), torch.tensor(c)) == 1)
    first = torch.randint(0, c, (*count.shape, 1), generator=gen)
    index = (first + torch.arange(width) * stride) % c
    return BlockPlan(
        n_queries=n, n_keys=n, q_start=start, q_len=(n - start).clamp(max=block), kv_start=start, kv_len=(n - start).clamp(max=block),
        count=count, n_full=count, index=index, list_order="priority",
    )  # fmt: skip


def sampled_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rows: list[int]) -> float:
    """Relative L2 error of rows of the first and last head against fp64. plan: of ``uniform_plan``, lists shared by heads, on the CPU."""
    got, want = [], []
    for head in (0, q.shape[1] - 1):
        for row in rows:
            r = row // plan.max_q_len
            blocks = plan.index[0, 0, r, : int(plan.count[0, 0, r])].long()
            keys = (blocks[:, None] * plan.max_kv_len + torch.arange(plan.max_kv_len)).flatten()
            keys = keys[keys < plan.n_keys].to(q.device)
            scores = k[0, head, keys].double() @ q[0, head, row].double() * q.shape[-1] ** -0.5
            want.append(scores.softmax(0) @ v[0, head, keys].double())
            got.append(out[0, head, row])
    return relative(torch.stack(got), torch.stack(want))
