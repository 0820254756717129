"""What makes a plan well formed. Shapes are always checked; values once, where that needs no waiting or is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveal.kernels.block_sparse.plan import BlockPlan


class PlanError(ValueError):
    """A plan that cannot be right, in one sentence."""


def _lead(x: Tensor, own: int) -> Tensor:
    """Add leading dimensions of size 1 until [Bm, Hm, ...own dims]."""
    while x.ndim < own + 2:
        x = x[None] if x.ndim != own + 1 else x.unsqueeze(1)
    return x


def _stored(x: Tensor, own: int) -> Tensor:
    """int32, contiguous, with leading dimensions."""
    x = _lead(x, own)
    return x if x.dtype == torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def canonical(plan: BlockPlan) -> dict[str, Any]:
    """Stored forms: geometry [Bm, Hm, n], lists [Bm, Hm, R(, K)], biases [Bm, Hm, R or 1, C] and [Bm, Hm, Pk]."""
    out: dict[str, Any] = {}
    for name in ("q_start", "q_len", "kv_start", "kv_len", "count", "n_full"):
        x = getattr(plan, name)
        if not isinstance(x, Tensor):
            raise PlanError(f"{name} is {type(x).__name__}; a plan needs an int32 tensor.")
        if not 1 <= x.ndim <= 3:
            raise PlanError(f"{name} has shape {tuple(x.shape)}; a plan needs [n], [B, n] or [B, H, n].")
        out[name] = _stored(x, 1)
    if not 2 <= plan.index.ndim <= 4:
        raise PlanError(f"index has shape {tuple(plan.index.shape)}; a plan needs [R, K] or [B, H, R, K].")
    out["index"] = _stored(plan.index, 2)
    if plan.row_bits is not None:
        out["row_bits"] = plan.row_bits.contiguous()
    if plan.block_bias is not None:
        bias = plan.block_bias
        if bias.ndim not in (3, 4):
            raise PlanError(f"block_bias has shape {tuple(bias.shape)}; a plan needs [B, H, C] or [B, H, R, C].")
        out["block_bias"] = (bias.unsqueeze(2) if bias.ndim == 3 else bias).float().contiguous()
    if plan.key_bias is not None:
        out["key_bias"] = plan.key_bias.float().contiguous()
    out["dense_rows"] = tuple((int(a), int(b)) for a, b in plan.dense_rows)
    return out


def without_padding(plan: BlockPlan) -> Tensor | None:
    """The key bias, with -inf where the key order holds padding."""
    if plan.ordered or plan.kv_order is None or not bool((plan.kv_order < 0).any()):
        return plan.key_bias
    order = plan.kv_order.reshape(*([1] * (3 - plan.kv_order.ndim)), *plan.kv_order.shape)
    base = torch.zeros(1, 1, 1, device=order.device) if plan.key_bias is None else plan.key_bias
    return torch.where(order < 0, -torch.inf, base).contiguous()


def _expect(ok: bool, sentence: str) -> None:
    if not ok:
        raise PlanError(sentence)


def check_shapes(plan: BlockPlan) -> None:
    """Agreement of shapes, dtypes and devices. Never waits for a device."""
    r, c = plan.n_q_blocks, plan.n_kv_blocks
    _expect(
        plan.n_queries >= 0 and plan.n_keys >= 0,
        f"n_queries {plan.n_queries} and n_keys {plan.n_keys} must not be negative.",
    )
    for name, n in (("q_len", r), ("count", r), ("n_full", r), ("kv_len", c)):
        got = getattr(plan, name).shape[-1]
        _expect(
            got == n, f"{name} describes {got} blocks; q_start and kv_start describe {n}: give one entry per block."
        )
    _expect(plan.index.shape[2] == r, f"index has {plan.index.shape[2]} rows; q_start describes {r} query blocks.")
    if plan.row_bits is not None:
        want = (plan.q_positions, (c + 31) // 32)
        got2 = tuple(plan.row_bits.shape[-2:])
        _expect(
            plan.row_bits.ndim == 4 and got2 == want,
            f"row_bits has shape {tuple(plan.row_bits.shape)}; [B, H, {want[0]}, {want[1]}] is needed.",
        )
    if plan.box is not None:
        a = plan.box.low.shape[0]
        for name, p in (("low", plan.q_positions), ("high", plan.q_positions), ("coord", plan.kv_positions)):
            shape = tuple(getattr(plan.box, name).shape)
            _expect(shape == (a, p), f"box.{name} has shape {shape}; [{a}, {p}] (mask axes, plan positions) is needed.")
    if plan.block_bias is not None:
        br, bc = plan.block_bias.shape[-2:]
        _expect(br in (1, r) and bc == c, f"block_bias ends in {(br, bc)}; (1 or {r}, {c}) is needed.")
    if plan.key_bias is not None:
        ok = plan.key_bias.ndim == 3 and plan.key_bias.shape[-1] == plan.kv_positions
        _expect(ok, f"key_bias has shape {tuple(plan.key_bias.shape)}; [B, H, {plan.kv_positions}] is needed.")
    if plan.proxies is not None:
        for name in ("k", "v", "k_var"):
            x = getattr(plan.proxies, name)
            _expect(
                x is None or (x.ndim == 4 and x.shape[2] == c),
                f"proxies.{name} must be [B, H, {c}, D], one per key block.",
            )
        _expect(
            plan.proxies.n.ndim == 3 and plan.proxies.n.shape[-1] == c,
            f"proxies.n must be [B, H, {c}], one count per key block.",
        )
    for first, last in plan.dense_rows:
        _expect(0 <= first <= last <= r, f"dense_rows range ({first}, {last}) lies outside the {r} query blocks.")
    devices = {x.device for x in _tensors(plan)}
    _expect(
        len(devices) == 1,
        f"the plan's tensors lie on {sorted(map(str, devices))}; move them to one device with plan.to(device).",
    )


def _tensors(plan: BlockPlan) -> list[Tensor]:
    found = [getattr(plan, n) for n in ("q_start", "q_len", "kv_start", "kv_len", "count", "n_full", "index")]
    found += [plan.q_order, plan.kv_order, plan.row_bits, plan.block_bias, plan.key_bias]
    if plan.box is not None:
        found += [plan.box.low, plan.box.high, plan.box.coord]
    if plan.proxies is not None:
        found += [plan.proxies.k, plan.proxies.v, plan.proxies.n, plan.proxies.k_var]
    return [x for x in found if x is not None]


def check_values(plan: BlockPlan) -> None:
    """Ranges, disjoint blocks, distinct list entries, orders that are permutations. Waits for the device."""
    _check_runs("query", plan.q_start, plan.q_len, plan.q_positions)
    _check_runs("key", plan.kv_start, plan.kv_len, plan.kv_positions)
    k = plan.index.shape[-1]
    _expect(bool(((plan.count >= 0) & (plan.count <= k)).all()), f"count must lie in 0..{k}, the width of index.")
    _expect(
        bool(((plan.n_full >= 0) & (plan.n_full <= plan.count)).all()),
        "n_full must lie in 0..count for every query block.",
    )
    _check_index(plan)
    if not plan.has_pair_masks:
        partial = plan.n_full < plan.count
        _expect(
            not bool(partial.any()),
            "the plan lists partial entries but has neither box nor row_bits: give a pair mask, or set n_full = count.",
        )
    if plan.box is not None and plan.box.cell is not None:
        _check_cell(plan)
    if not plan.ordered:
        _check_order("q_order", plan.q_order, plan.n_queries)
        _check_order("kv_order", plan.kv_order, plan.n_keys)


def _check_cell(plan: BlockPlan) -> None:
    assert plan.box is not None and plan.box.cell is not None
    cell = torch.tensor(plan.box.cell, device=plan.device)
    place = torch.arange(plan.index.shape[-1], device=plan.device)
    partial = (place >= plan.n_full[..., None]) & (place < plan.count[..., None])
    blocks = plan.index[partial].unique().long()
    for start, length in zip(
        plan.kv_start.flatten(0, 1), plan.kv_len.expand_as(plan.kv_start).flatten(0, 1), strict=True
    ):
        whole = bool((length[blocks] == cell.shape[1]).all())
        at = (start[blocks, None] + torch.arange(cell.shape[1], device=plan.device)).clamp(max=plan.kv_positions - 1)
        found = plan.box.coord[:, at] - plan.box.coord[:, at[:, :1]]
        _expect(
            whole and bool((found == cell[:, None]).all()),
            "box.cell does not describe the keys of every block that is a partial entry; leave it out, or give blocks of one shape.",
        )


def _check_runs(side: str, start: Tensor, length: Tensor, positions: int) -> None:
    if start.numel() == 0:
        return
    start, length = torch.broadcast_tensors(start, length)
    low, high = int(start.min()), int((start + length).max())
    ok = bool((length >= 0).all()) and low >= 0 and high <= positions
    _expect(ok, f"{side} blocks reach positions {low}..{high}; the sequence has 0..{positions}.")
    real = torch.where(length > 0, start, positions)
    order = torch.argsort(real, dim=-1, stable=True)
    s, n = real.gather(-1, order), length.gather(-1, order)
    clash = (s[..., 1:] < s[..., :-1] + n[..., :-1]) & (n[..., 1:] > 0)
    _expect(not bool(clash.any()), f"two {side} blocks overlap; blocks must be disjoint runs.")


def _check_index(plan: BlockPlan) -> None:
    k, c = plan.index.shape[-1], plan.n_kv_blocks
    if k == 0:
        return
    listed = torch.arange(k, device=plan.index.device) < plan.count[..., None]
    index, listed = torch.broadcast_tensors(plan.index, listed)
    bad = listed & ((index < 0) | (index >= c))
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        value = int(index[tuple(where)])
        raise PlanError(f"index{where} is {value}; the plan has key blocks 0..{c - 1}.")
    seen = torch.where(listed, index, c + torch.arange(k, device=index.device, dtype=index.dtype)).sort(-1).values
    _expect(
        not bool((seen[..., 1:] == seen[..., :-1]).any()),
        "a query block lists the same key block twice; its keys would count twice.",
    )


def ascend(plan: BlockPlan) -> bool:
    """Whether every list names its key blocks in ascending order, its full entries and its partial ones apart."""
    place = torch.arange(1, plan.index.shape[-1], device=plan.index.device)
    inside = (place < plan.count[..., None]) & (place != plan.n_full[..., None])
    return bool((~inside | (plan.index[..., 1:] > plan.index[..., :-1])).all())


def _check_order(name: str, order: Tensor | None, n: int) -> None:
    if order is None:
        return
    flat = order.reshape(-1, order.shape[-1]).long()
    _expect(bool(((flat >= -1) & (flat < n)).all()), f"{name} holds values outside -1..{n - 1}.")
    hits = torch.zeros(flat.shape[0], n + 1, dtype=torch.int32, device=flat.device)
    hits.scatter_add_(1, torch.where(flat < 0, n, flat), torch.ones_like(flat, dtype=torch.int32))
    _expect(bool((hits[:, :n] == 1).all()), f"{name} must name each of the {n} tokens exactly once (-1 is padding).")


def require_keys(plan: BlockPlan) -> None:
    lengths = plan.kv_len[:, :, None, :]
    seen = (plan.visits() & (lengths > 0)).any(-1)
    used = torch.broadcast_to(plan.q_len > 0, seen.shape)
    empty = used & ~seen
    if bool(empty.any()):
        b, h, r = empty.nonzero()[0].tolist()
        raise PlanError(
            f"query block {r} of batch {b}, head {h} visits no key; every row of this method needs at least one."
        )
    _expect(bool(plan.covers), "some queries lie in no block; every query of this method needs one.")
