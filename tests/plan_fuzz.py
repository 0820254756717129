"""Random calls of the block-sparse operator: shapes, strides, densities, empty and full rows, ragged tails, masks, biases.

A recipe fixes what a compiler specialises on (dtype, head dim, features), so that many cases share one compiled variant.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, Box, Proxies
from foveal.kernels.merge import merge_attention


@dataclass(frozen=True)
class Recipe:
    """One family of cases: heads share keys where ``grouped``; blocks are uniform multiples of 64 where ``even``."""

    dtype: torch.dtype
    head_dim: int
    features: frozenset[str]

    @property
    def id(self) -> str:
        return f"{str(self.dtype)[6:]}-{self.head_dim}-{'+'.join(sorted(self.features)) or 'plain'}"


FEATURES = (
    {"even"}, {"even", "lse", "order"}, {"lse", "dense"}, {"order", "dense"}, {"heads", "lse"}, {"box", "lse", "order"}, {"bits", "heads"},
    {"block_bias", "heads", "lse"}, {"key_bias", "order", "lse"}, {"proxies", "heads", "lse"}, {"proxies", "variance", "block_bias"},
    {"init", "lse"}, {"box", "bits", "block_bias", "key_bias", "dense", "init", "lse", "order", "heads", "proxies"}, {"grouped", "even", "dense"},
)  # fmt: skip


def recipes(dtypes: tuple[torch.dtype, ...], head_dims: tuple[int, ...]) -> list[Recipe]:
    """Every feature set once, dtypes and head dims taking turns."""
    return [
        Recipe(dtypes[i % len(dtypes)], head_dims[i % len(head_dims)], frozenset(f)) for i, f in enumerate(FEATURES)
    ]


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    scale: float
    init: tuple[Tensor, Tensor] | None


def _cuts(rng: random.Random, n: int, parts: int) -> tuple[Tensor, Tensor]:
    """n tokens in runs of any length, empty ones included."""
    marks = sorted(rng.randint(0, n) for _ in range(parts - 1))
    edges = torch.tensor([0, *marks, n], dtype=torch.int32)
    return edges[:-1], edges[1:] - edges[:-1]


def make_case(recipe: Recipe, seed: int, device: str = "cpu", longest: int = 64) -> Case:
    """A random call. ``longest`` bounds the sequence length."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    f, d = recipe.features, recipe.head_dim
    b, h = rng.randint(1, 2), 2
    hk = 1 if "grouped" in f else h
    if "even" in f:
        block = 64 if longest >= 128 else 16  # enough key blocks for the kernel's variant of even plans
        block *= 2 if "wide" in f else 1
        n, m = block * rng.randint(1, 8), block * rng.randint(16, 20)
        kv_start = torch.arange(0, m, block, dtype=torch.int32)
        kv_len = torch.full_like(kv_start, block)
    else:
        n, m = rng.randint(1, longest), rng.randint(1, longest)
        kv_start, kv_len = _cuts(rng, m, rng.randint(1, 6))
    q_start, q_len = _cuts(rng, n, rng.randint(2, 4))

    def tensor(heads: int, length: int) -> Tensor:
        x = (
            torch.randn(b, length, heads, d, generator=gen)
            if rng.random() < 0.5
            else torch.randn(b, heads, length, d, generator=gen).transpose(1, 2)
        )
        return x.to(device, recipe.dtype).transpose(1, 2)

    q, k, v = tensor(h, n), tensor(hk, m), tensor(hk, m)
    fields = _fields(rng, gen, f, (b, h), n, m, q_start.numel(), kv_start.numel())
    if "proxies" in f:
        fields["proxies"] = _proxies(gen, f, k, kv_start.numel())
    plan = BlockPlan(
        n_queries=n, n_keys=m, q_start=q_start, q_len=q_len, kv_start=kv_start, kv_len=kv_len, **fields
    ).to(device)
    init = None
    if "init" in f:
        lse = torch.randn(b, h, n, generator=gen).masked_fill(torch.rand(b, h, n, generator=gen) < 0.2, -torch.inf)
        lse = lse.to(torch.promote_types(recipe.dtype, torch.float32))
        init = (torch.randn(b, h, n, d, generator=gen).to(device, recipe.dtype), lse.to(device))
    return Case(q, k, v, plan, rng.choice([d**-0.5, 0.3, -0.1] if "init" in f else [d**-0.5, 0.05]), init)


def _fields(
    rng: random.Random, gen: torch.Generator, f: frozenset[str], lead: tuple[int, int], n: int, m: int, r: int, c: int
) -> dict[str, Any]:
    lead = lead if "heads" in f else (1, 1)
    random_ints = lambda high, *shape: torch.randint(0, max(1, high), shape, generator=gen)  # noqa: E731
    keep = rng.choice([0.0, 0.3, 0.7, 1.0])
    ranks = torch.rand(*lead, r, c, generator=gen)
    count = (ranks < keep).sum(-1).to(torch.int32)
    masked = bool(f & {"box", "bits"})
    out: dict[str, Any] = {
        "count": count, "n_full": (count * torch.rand(*lead, r, generator=gen)).to(torch.int32) if masked else count,
        "index": torch.rand(*lead, r, c, generator=gen).argsort(-1).to(torch.int32), "list_order": "priority",
    }  # fmt: skip
    if "box" in f:
        low = random_ints(m // 2 + 1, 2, n)
        coord = torch.stack([torch.arange(m), random_ints(m, m)])
        out["box"] = Box(low.short(), (low + random_ints(m, 2, n)).short(), coord.short())
    if "bits" in f:
        out["row_bits"] = random_ints(1 << 20, *lead, n, (c + 31) // 32).to(torch.int32)
    if "block_bias" in f:
        out["block_bias"] = _with_gaps(torch.randn(*lead, r if rng.random() < 0.5 else 1, c, generator=gen))
    if "key_bias" in f:
        out["key_bias"] = _with_gaps(torch.randn(*lead, m, generator=gen))
    if "order" in f:
        out["q_order"], out["kv_order"] = torch.randperm(n, generator=gen), torch.randperm(m, generator=gen)
    if "dense" in f:
        out["dense_rows"] = ((r - 1, r),)
    return out


def _with_gaps(bias: Tensor) -> Tensor:
    return bias.masked_fill(bias > 1.2, -torch.inf)


def _proxies(gen: torch.Generator, f: frozenset[str], k: Tensor, c: int) -> Proxies:
    shape = (k.shape[0], k.shape[1], c, k.shape[3])
    mean = lambda: torch.randn(shape, generator=gen).to(k.dtype)  # noqa: E731
    n = torch.randint(0, 9, (1, 1, c), generator=gen).float()
    return Proxies(mean(), mean(), n, torch.rand(shape, generator=gen) if "variance" in f else None)


def eager(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Textbook masked attention in ``dtype``, every intermediate rounded to it: the yardstick, and in fp64 the truth.

    Written from the definition of a plan, on ``plan.mask()`` and block ownership, not on any implementation.
    """
    plan = case.plan
    group = case.q.shape[1] // case.k.shape[1]
    q, k, v = (x.to(dtype) for x in (case.q, case.k.repeat_interleave(group, 1), case.v.repeat_interleave(group, 1)))
    scores = (q @ k.mT) * case.scale + bias_of(plan).to(dtype)
    scores = scores.masked_fill(~plan.mask(), -torch.inf)
    if plan.proxies is not None:
        extra = proxy_scores(plan, q, case.scale, group)
        scores, v = (
            torch.cat([scores, extra.to(dtype)], -1),
            torch.cat([v, plan.proxies.v.repeat_interleave(group, 1).to(dtype)], 2),
        )
    lse = torch.logsumexp(scores.double() if dtype == torch.float64 else scores.float(), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    out = weights @ v
    if case.init is not None:
        out, lse = merge_attention(
            (out, lse.to(torch.promote_types(dtype, torch.float32))),
            (case.init[0].to(dtype), case.init[1].to(lse.dtype)),
        )
    return out, lse


def bias_of(plan: BlockPlan) -> Tensor:
    """Biases at every pair of the caller's tokens. -> [Bm, Hm, N, M]"""
    n, m = plan.n_queries, plan.n_keys
    total = torch.zeros(1, 1, n, m, dtype=torch.float64, device=plan.device)
    order = plan.kv_order if plan.kv_order is not None else torch.arange(m, device=plan.device)
    q_order = plan.q_order if plan.q_order is not None else torch.arange(n, device=plan.device)
    if plan.key_bias is not None:
        total = (
            total + torch.empty_like(plan.key_bias).index_copy_(-1, order.to(plan.device), plan.key_bias)[:, :, None]
        )
    if plan.block_bias is not None:
        rows = _owners(plan.q_start, plan.q_len, n)
        cols = _owners(plan.kv_start, plan.kv_len, m)
        table = plan.block_bias.expand(-1, -1, plan.n_q_blocks, -1)[:, :, rows.clamp(min=0)][..., cols.clamp(min=0)]
        placed = torch.empty_like(table).index_copy_(2, q_order, table)
        total = total + torch.empty_like(table).index_copy_(3, order, placed)
    return total


def _owners(start: Tensor, length: Tensor, positions: int) -> Tensor:
    owner = torch.full((positions,), -1, dtype=torch.long)
    for i, (s, e) in enumerate(zip(start.flatten().tolist(), length.flatten().tolist(), strict=True)):
        owner[s : s + e] = i
    return owner.to(start.device)


def proxy_scores(plan: BlockPlan, q: Tensor, scale: float, group: int) -> Tensor:
    assert plan.proxies is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = plan.proxies.k.repeat_interleave(group, 1).to(q.dtype)
    scores = ((q @ keys.mT) * scale).to(wide) + plan.proxies.n.to(wide).log()[:, :, None]
    if plan.proxies.k_var is not None:
        scores = scores + 0.5 * scale**2 * (
            q.to(wide).square() @ plan.proxies.k_var.repeat_interleave(group, 1).to(wide).mT
        )
    rows = _owners(plan.q_start, plan.q_len, plan.n_queries)
    hidden = plan.visits()[:, :, rows]
    if plan.block_bias is not None:
        scores = scores + _ordered(plan, plan.block_bias.expand(-1, -1, plan.n_q_blocks, -1)[:, :, rows].to(wide))
    return scores.masked_fill(_ordered(plan, hidden), -torch.inf)


def _ordered(plan: BlockPlan, x: Tensor) -> Tensor:
    """Rows from plan order to the caller's."""
    return x if plan.q_order is None else torch.empty_like(x).index_copy_(2, plan.q_order, x)


def in_double(case: Case) -> Case:
    plan = case.plan
    if plan.proxies is not None:
        p = plan.proxies
        plan = dataclasses.replace(
            plan, proxies=Proxies(p.k.double(), p.v.double(), p.n, None if p.k_var is None else p.k_var.double())
        )
    return dataclasses.replace(case, q=case.q.double(), k=case.k.double(), v=case.v.double(), plan=plan)


def errors(case: Case, out: Tensor, lse: Tensor | None) -> tuple[float, float]:
    """(our error, eager attention's error in the same dtype), both relative L2 against fp64.

    Raises AssertionError where emptiness of rows or the log-sum-exp is wrong.
    """
    true, true_lse = eager(in_double(case), torch.float64)
    rough, _ = eager(case, case.q.dtype)
    if lse is not None:
        assert torch.equal(lse == -torch.inf, true_lse == -torch.inf), (
            "rows without keys must have LSE -inf, and only they"
        )
        seen = true_lse > -torch.inf
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(case.q.dtype, 2e-2)
        torch.testing.assert_close(lse.double()[seen], true_lse[seen], atol=tolerance, rtol=tolerance)
    size = true.norm().clamp(min=1e-30)
    return ((out.double() - true).norm() / size).item(), ((rough.double() - true).norm() / size).item()
