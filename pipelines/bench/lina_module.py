"""The attention module of LINA's decoder beside the softmax module of the same projections: rows of `bench vision`.

Letters: B batch, N tokens (M of the condition, then an image of n), D width, H heads.
Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens"; at 1024 pixels N is 5120 and D 1536.

Notable choices
- Each module is held against softmax of its own kind: called as a model would, or (rows named "graph") replayed as a CUDA graph.
- The whole module is timed: projections in and out, attention, and for the linear one its gates and its convolution of the image.
- The softmax module has neither gates nor convolution, as in the generator that LINA replaces: the linear one does more and is timed
  with it.
- Random weights; both modules share them. The error is that of the linear module in the bench's dtype against itself in fp64.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.pipelines.bench.image_models import FALLBACK, ON_CPU, ON_GPU, added_bytes, backend
from foveal.pipelines.bench.linear import GRAPH, graphed
from foveal.pipelines.bench.rounds import How
from foveal.pipelines.bench.rows import SHORT, Rows, row
from foveal.vision.lina_attention import LinearAttention
from foveal.vision.lina_counting import attention_macs

GOAL = (1.5, 2.2)
LINEAR, SOFTMAX = "linear", "softmax"


@dataclass(frozen=True, kw_only=True)
class ModuleCase:
    """prefix: M; image: n, a square; dim: D."""

    name: str
    prefix: int
    image: int
    dim: int
    heads: int
    batch: int = 1
    group: str = "module"

    @property
    def tokens(self) -> int:
        return self.prefix + self.image


class SoftmaxModule(nn.Module):
    """[B, N, D] -> [B, N, D]: projections around softmax attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modules_of(case: ModuleCase) -> tuple[nn.Module, nn.Module]:
    """-> softmax, linear; the projections are shared."""
    torch.manual_seed(0)
    linear = LinearAttention(case.dim, case.heads, gate="raw", tokens=case.tokens, prefix=case.prefix, conv=True)
    for gate in (linear.key_scale, linear.value_scale):
        gate.data += 0.1 * torch.randn_like(gate)  # as trained ones are: no two alike
    softmax = SoftmaxModule(case.dim, case.heads)
    softmax.qkv, softmax.proj = linear.qkv, linear.proj
    return softmax, linear


@torch.no_grad()
def module_rows(case: ModuleCase, how: How) -> Rows:
    """Both modules, called as a model would and, on a GPU, as a CUDA graph: the device's time alone."""
    with how.device:
        softmax, linear = (m.to(how.dtype).requires_grad_(False) for m in modules_of(case))
        x = torch.randn(case.batch, case.tokens, case.dim, dtype=how.dtype)
    found: Rows = []
    for order in [(b, FALLBACK) for b in ON_GPU] if how.device.type == "cuda" else [ON_CPU]:
        calls: dict[str, Any] = {SOFTMAX: lambda: softmax(x), LINEAR: lambda: linear(x)}
        if how.device.type == "cuda":
            calls |= {n + GRAPH: graphed(c) for n, c in calls.items()}
        with backend(order):
            timed = how.time(calls)
        one: Rows = []
        for name in calls:
            base = base_of(name)
            facts: dict[str, Any] = {
                "shape": {"tokens": case.tokens, "heads": case.heads, "head_dim": case.dim // case.heads, "batch": case.batch},
                "dtype": SHORT[how.dtype], "sdpa": order[0].name, "includes": ["module"],
                "goal": GOAL if name.startswith(LINEAR) else None,
            }  # fmt: skip
            kind = {"softmax": True} if name.startswith(SOFTMAX) else {"image_tokens": case.image}
            facts["multiply_adds"] = case.batch * attention_macs(case.tokens, case.dim, case.heads, **kind)
            if name in (SOFTMAX, LINEAR):
                facts["peak_bytes"] = peak_bytes(softmax if name == SOFTMAX else linear, x, how.device)
            if name == LINEAR:
                facts["rel_l2"] = error_of(linear, x)
            one.append(
                row(case.name, "attention_module", name, timed, base if base in timed.timings else None, **facts)
            )
        found = _better(found, one)
    return found


def _better(held: Rows, new: Rows) -> Rows:
    """Of two measurements the rows in which softmax of their own kind (graph or not) was faster: no baseline is made slow."""
    if not held:
        return new
    ms = lambda rows, name: next((r["ms"] for r in rows if r["impl"] == name and r["ms"] is not None), math.inf)  # noqa: E731
    found: Rows = []
    for one, other in zip(held, new, strict=True):
        base = base_of(one["impl"])
        found.append(other if ms(new, base) < ms(held, base) else one)
    return found


def base_of(name: str) -> str:
    return SOFTMAX + GRAPH if name.endswith(GRAPH) else SOFTMAX


def peak_bytes(module: nn.Module, x: Tensor, device: torch.device) -> int | None:
    """What a process with this module alone would hold at its peak; None off the GPU."""
    added = added_bytes(lambda: module(x), device)
    own = sum(t.numel() * t.element_size() for t in (*module.parameters(), x))
    return None if added is None else added + own


def error_of(module: nn.Module, x: Tensor) -> float:
    """Relative L2 error of the module's output against fp64."""
    exact = copy.deepcopy(module).double()(x.double())
    return float((module(x).double() - exact).norm() / exact.norm())
