"""The PyTorch implementation: gather each query block's keys, then SDPA. Any device.

Letters as in plan.py; D head dim, G query heads per key head, n a batch of alike query blocks.

* Keys of a block are runs of plan positions, so gathering is slicing; neighbouring runs become one slice without a copy.
* Large query blocks run one by one (each is enough work); small alike blocks run as one batch.
* A batch takes no more memory than k does (half of it where k and v had to be put in order first), and goes before the next is made.
* Masks, biases and proxies travel as one additive bias; blocks that need none keep SDPA's fast path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.block_sparse.plan import BlockPlan
from foveal.kernels.order import take_tokens

LONE_ROWS = 192  # query blocks at least this long are worth a call of their own on a CPU
BATCH_ELEMENTS = 1 << 24  # gathered key elements in one batch of small blocks, where memory is no concern
LEAST_ROOM = 1 << 20  # bytes that a batch may always take: smaller ones cost more in calls than they save
PAIR_BYTES = 8  # of a masked pair: its bias in fp32, the comparisons behind it, and a copy in a narrower type

Run = tuple[int, int]


class Row(NamedTuple):
    """One query block on the host: its positions, the runs of its keys, its list, and the list without blocks of length 0."""

    block: int
    start: int
    length: int
    runs: tuple[Run, ...]
    keys: int
    listed: tuple[int, ...]
    full: tuple[int, ...]
    partial: tuple[int, ...]


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """q [B, H, N, D], k, v [B, Hkv, M, D] -> (out with q's strides, lse fp32 [B, H, N] or None)."""
    out = torch.empty_like(q) if plan.covers else torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=lse_dtype(q)) if need_lse else None
    copies = plan.kv_order is not None and not plan.ordered
    room = max(LEAST_ROOM, k.numel() * k.element_size() // (2 if copies else 1))
    for piece in pieces(q, k, v, plan, scale, room):
        o, m = piece.attend(scale, need_lse)
        piece.put(out, o)
        if lse is not None:
            assert m is not None
            piece.put(lse[..., None], m[..., None])
        del piece, o, m
    return out, lse


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class Piece(NamedTuple):
    """Alike query blocks with their gathered keys. q [b, h, n, L, D]; k, v [b, hk, n, S, D]; bias broadcasts to [b, h, n, L, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    rows: Tensor | slice  # caller's query tokens [n * L], or the slice of one lone block
    heads: tuple[slice, slice]  # batch items and query heads
    key_heads: slice
    key_rows: Tensor  # caller's key tokens [n * S]
    listed: int  # keys that came from blocks; the rest of S are proxies

    def attend(self, scale: float, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        return attend(self.q, self.k, self.v, self.bias, scale, need_lse)

    def put(self, out: Tensor, part: Tensor) -> None:
        part = part.flatten(2, 3)
        target = out[self.heads[0], self.heads[1]]
        if isinstance(self.rows, slice):
            target[:, :, self.rows] = part.to(out.dtype)
        else:
            live = self.rows >= 0
            if bool(live.all()):
                target.index_copy_(2, self.rows, part.to(out.dtype))
            else:
                target.index_copy_(2, self.rows[live], part[:, :, live].to(out.dtype))


def pieces(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, room: int | None = None) -> Iterator[Piece]:
    """Cut the call into pieces: per batch item and head only where the plan differs there. room: bytes a batch may take."""
    qp, kp, vp = q, k, v
    if not plan.ordered and plan.kv_order is not None:
        kp, vp = take_tokens(k, plan.kv_order), take_tokens(v, plan.kv_order)
    b, h = q.shape[:2]
    hosts = host_rows(plan)
    group = h // k.shape[1]
    for (i, j), rows in hosts.items():
        bs = slice(0, b) if plan_lead(plan)[0] == 1 else slice(i, i + 1)
        hs = slice(0, h) if plan_lead(plan)[1] == 1 else slice(j, j + 1)
        ks = slice(0, k.shape[1]) if plan_lead(plan)[1] == 1 else slice(j // group, j // group + 1)
        part = _Part(plan, qp[bs, hs], kp[bs, ks], vp[bs, ks], (bs, hs, ks), (i, j), scale)
        for batch in _batches(rows, q.device.type == "cpu", part, room):
            yield part.piece(batch)


def plan_lead(plan: BlockPlan) -> tuple[int, int]:
    """The batch and head counts over which the plan differs, 1 where shared (proxies' k and v always follow their head)."""
    tensors = [
        plan.q_start,
        plan.q_len,
        plan.kv_start,
        plan.kv_len,
        plan.count,
        plan.index,
        plan.row_bits,
        plan.block_bias,
        plan.key_bias,
    ]
    orders = [] if plan.ordered else [plan.q_order, plan.kv_order]
    shapes = [x.shape[:2] for x in tensors if x is not None] + [
        x.shape[:2] for x in orders if x is not None and x.ndim == 3
    ]
    if plan.proxies is not None:
        shapes.append(plan.proxies.n.shape[:2])
    lead = torch.broadcast_shapes(*shapes)
    return lead[0], lead[1]


def host_rows(plan: BlockPlan) -> dict[tuple[int, int], list[Row]]:
    """The lists on the host, per (batch, head) where they differ; worked out once per plan."""
    cached = plan.derived.get("host_rows")
    if cached is None:
        nb, nh = plan_lead(plan)
        cached = {(i, j): _rows(plan, i, j) for i in range(nb) for j in range(nh)}
        plan.derived["host_rows"] = cached
    return cached


def at(x: Tensor, i: int, j: int) -> Tensor:
    return x[min(i, x.shape[0] - 1), min(j, x.shape[1] - 1)]


def _rows(plan: BlockPlan, i: int, j: int) -> list[Row]:
    ks, kn = at(plan.kv_start, i, j).tolist(), at(plan.kv_len, i, j).tolist()
    qs, qn = at(plan.q_start, i, j).tolist(), at(plan.q_len, i, j).tolist()
    count, n_full, index = (at(x, i, j).tolist() for x in (plan.count, plan.n_full, plan.index))
    dense = {r for first, last in plan.dense_rows for r in range(first, last)}
    rows = []
    for r in range(plan.n_q_blocks):
        if qn[r] == 0:
            continue
        listed = range(plan.n_kv_blocks) if r in dense else index[r][: count[r]]
        split = len(listed) if r in dense else n_full[r]
        full = tuple(c for c in listed[:split] if kn[c])
        partial = tuple(c for c in listed[split:] if kn[c])
        runs = _runs([(ks[c], kn[c]) for c in (*full, *partial)])
        rows.append(Row(r, qs[r], qn[r], runs, sum(e - s for s, e in runs), tuple(listed), full, partial))
    return rows


def _runs(blocks: list[tuple[int, int]]) -> tuple[Run, ...]:
    """Join blocks that follow each other into runs (start, stop)."""
    runs: list[Run] = []
    for start, length in blocks:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + length)
        else:
            runs.append((start, start + length))
    return tuple(runs)


def _batches(rows: list[Row], cpu: bool, part: _Part, room: int | None) -> Iterator[list[Row]]:
    """Lone large blocks, and batches of small blocks of equal shape."""
    alike: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if cpu and row.length >= LONE_ROWS:
            yield [row]
        else:
            alike.setdefault((row.length, row.keys), []).append(row)
    per_key = part.k.shape[0] * part.k.shape[1] * part.k.shape[3]
    for (length, keys), group in alike.items():
        step = max(1, BATCH_ELEMENTS // max(1, keys * per_key))
        if room is not None:
            step = max(1, min(step, room // part.bytes(length, keys)))
        for at_ in range(0, len(group), step):
            yield group[at_ : at_ + step]


class _Part:
    """One (batch, head) share of the call, keys in plan order."""

    def __init__(
        self,
        plan: BlockPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slices: tuple[slice, slice, slice],
        lead: tuple[int, int],
        scale: float,
    ):
        self.plan, self.q, self.k, self.v, self.slices, self.lead, self.scale = plan, q, k, v, slices, lead, scale
        order = None if plan.ordered else plan.q_order
        self.q_order = None if order is None else (order if order.ndim == 1 else at(order, *lead)).long()
        order = None if plan.ordered else plan.kv_order
        self.kv_order = None if order is None else (order if order.ndim == 1 else at(order, *lead)).long()

    def bytes(self, length: int, keys: int) -> int:
        """What a block of so many queries and keys takes: k and v; q, its result and one copy of each; and pair masks."""
        (b, h, _, d), size = self.q.shape, self.q.element_size()
        pairs = length * keys if self.plan.has_pair_masks or self.plan.proxies is not None else 0
        return max(1, size * d * b * (2 * keys * self.k.shape[1] + 4 * length * h) + PAIR_BYTES * pairs)

    def piece(self, batch: list[Row]) -> Piece:
        n, length, keys = len(batch), batch[0].length, batch[0].keys
        lone = n == 1
        q_pos = self._positions([(r.start, r.start + r.length) for r in batch])
        k_pos = self._positions([run for r in batch for run in r.runs])
        rows: Tensor | slice
        if self.q_order is None and lone:
            rows = slice(batch[0].start, batch[0].start + length)
            q = self.q[:, :, rows]
        else:
            rows = q_pos if self.q_order is None else self.q_order[q_pos]
            q = self.q.index_select(2, rows.clamp(min=0))
        q = q.unflatten(2, (n, length))
        k, v = (self._keys(x, batch[0].runs if lone else None, k_pos).unflatten(2, (n, keys)) for x in (self.k, self.v))
        bias = self._bias(batch, q_pos.view(n, length), k_pos.view(n, keys))
        if self.plan.proxies is not None:
            q, k, v, bias = self._with_proxies(batch, q, k, v, bias)
        key_rows = k_pos if self.kv_order is None else self.kv_order[k_pos]
        return Piece(q, k, v, bias, rows, self.slices[:2], self.slices[2], key_rows, keys)

    def _positions(self, runs: list[Run]) -> Tensor:
        device = self.q.device
        if not runs:
            return torch.zeros(0, dtype=torch.long, device=device)
        return torch.cat([torch.arange(s, e, device=device) for s, e in runs])

    def _keys(self, x: Tensor, runs: tuple[Run, ...] | None, positions: Tensor) -> Tensor:
        if runs is None:
            return x.index_select(2, positions)
        if len(runs) == 1:
            return x[:, :, runs[0][0] : runs[0][1]]
        return torch.cat([x[:, :, s:e] for s, e in runs], 2) if runs else x[:, :, :0]

    def _bias(self, batch: list[Row], q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """Everything that is not plain attention, as one additive bias [n, L, S] (or with size-1 dims), or None."""
        plan, terms = self.plan, []
        if any(r.partial for r in batch):
            terms.append(self._pair_bias(batch, q_pos, k_pos))
        if plan.key_bias is not None:
            terms.append(at(plan.key_bias, *self.lead)[k_pos][:, None])
        if plan.block_bias is not None:
            table = at(plan.block_bias, *self.lead)
            table = table.expand(plan.n_q_blocks, -1)
            owner = self._key_owner(batch)
            block = torch.tensor([r.block for r in batch], device=q_pos.device)
            terms.append(table[block[:, None], owner][:, None])
        return sum(terms[1:], terms[0]) if terms else None

    def _key_owner(self, batch: list[Row]) -> Tensor:
        """Key block of every gathered key. -> int64 [n, S]"""
        length = at(self.plan.kv_len, *self.lead).tolist()
        blocks = [[c for c in (*r.full, *r.partial) for _ in range(length[c])] for r in batch]
        return torch.tensor(blocks, dtype=torch.long, device=self.q.device).view(len(batch), -1)

    def _pair_bias(self, batch: list[Row], q_pos: Tensor, k_pos: Tensor) -> Tensor:
        plan = self.plan
        ok = torch.ones(*q_pos.shape, k_pos.shape[1], dtype=torch.bool, device=q_pos.device)
        if plan.box is not None:
            for low, high, coord in zip(plan.box.low, plan.box.high, plan.box.coord, strict=True):
                c = coord[k_pos][:, None]
                ok &= (low[q_pos][..., None] <= c) & (c < high[q_pos][..., None])
        if plan.row_bits is not None:
            owner = self._key_owner(batch)
            words = at(plan.row_bits, *self.lead)[q_pos]
            index = (owner // 32)[:, None].expand(-1, q_pos.shape[1], -1)
            ok &= ((words.gather(2, index) >> (owner % 32)[:, None]) & 1).bool()
        length = at(plan.kv_len, *self.lead).tolist()
        lead = torch.tensor([sum(length[c] for c in r.full) for r in batch], device=q_pos.device)
        ok |= (torch.arange(k_pos.shape[1], device=q_pos.device) < lead[:, None])[:, None]
        return torch.where(ok, 0.0, -torch.inf)

    def _with_proxies(
        self, batch: list[Row], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        plan, n = self.plan, len(batch)
        assert plan.proxies is not None
        bs, _, ks = self.slices
        pk, pv = (x[bs, ks].to(k.dtype) for x in (plan.proxies.k, plan.proxies.v))
        listed = torch.zeros(n, plan.n_kv_blocks, dtype=torch.bool, device=q.device)
        for i, row in enumerate(batch):
            listed[i, list(row.listed)] = True
        extra = at(plan.proxies.n, *self.lead).to(lse_dtype(q)).log().expand(n, -1).masked_fill(listed, -torch.inf)
        if plan.block_bias is not None:
            block = torch.tensor([r.block for r in batch], device=q.device)
            extra = extra + at(plan.block_bias, *self.lead).expand(plan.n_q_blocks, -1)[block]
        extra = extra[:, None]
        if bias is None:
            bias = torch.zeros(1, 1, k.shape[3], device=q.device)
        whole = (n, q.shape[3])
        bias = torch.cat([bias.expand(*whole, -1), extra.expand(*whole, -1)], -1)
        join = lambda x, p: torch.cat([x, p[:, :, None].expand(-1, -1, n, -1, -1)], 3)  # noqa: E731
        k, v = join(k, pk), join(v, pv)
        if plan.proxies.k_var is not None:  # scale^2/2 q^2.var is one more dot product: [q, q^2].[k, scale/2 var]
            var = 0.5 * self.scale * plan.proxies.k_var[bs, ks][:, :, None].expand(-1, -1, n, -1, -1).to(lse_dtype(q))
            q = torch.cat([q.to(var.dtype), q.to(var.dtype).square()], -1)
            zero = var.new_zeros(*k.shape[:3], k.shape[3] - var.shape[3], var.shape[-1])
            k, v = torch.cat([k.to(var.dtype), torch.cat([zero, var], 3)], -1), v.to(var.dtype)
        return q, k, v, bias


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Plain attention of every block. Shapes as in ``Piece`` -> (out like q, lse [b, h, n, L] or None)."""
    if k.shape[3] == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_full(q.shape[:-1], -torch.inf, dtype=lse_dtype(q))
    group = q.shape[1] // k.shape[1]
    shape = q.shape
    if group > 1:  # fold the heads that share keys into query rows
        q = q.unflatten(1, (-1, group)).transpose(2, 3).flatten(3, 4)
        bias = bias if bias is None or bias.shape[-2] == 1 else bias.repeat(1, group, 1)
    run = _flash_cpu if need_lse and _flash_ready(q, v.shape[-1]) else (_explicit if need_lse else _sdpa)
    out, lse = run(q, k, v, bias, scale)
    if group > 1:
        unfold: Callable[[Tensor], Tensor] = lambda x: x.unflatten(3, (group, shape[3])).transpose(2, 3).flatten(1, 2)  # noqa: E731
        out, lse = unfold(out), None if lse is None else unfold(lse)
    return out, lse


def _merge(x: Tensor) -> Tensor:
    """[b, h, n, L, D] -> [b, h, L, D] for one block and [b * h, n, L, D] for many, as SDPA takes it: views, masks included."""
    return x[:, :, 0] if x.shape[2] == 1 else x.flatten(0, 1)


def _split(x: Tensor, q: Tensor) -> Tensor:
    """Undoes ``_merge`` for q [b, h, n, ..]: -> [b, h, n, ..]"""
    return x[:, :, None] if q.shape[2] == 1 else x.unflatten(0, q.shape[:2])


def _mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """[n, L, S] or with size-1 dims -> shared by batch items and heads, without a copy for each."""
    if bias is None:
        return None
    b, h, n = q.shape[:3]
    full = bias.to(q.dtype).expand(n, q.shape[3], -1)
    return full[0].expand(b, h, -1, -1) if n == 1 else full.expand(b * h, -1, -1, -1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, None]:
    out = F.scaled_dot_product_attention(_merge(q), _merge(k), _merge(v), attn_mask=_mask(bias, q), scale=scale)
    if bias is not None:  # a row that sees nothing is 0, whatever the backend makes of it
        seen = (bias > -torch.inf).any(-1, keepdim=True).expand(q.shape[2], q.shape[3], 1)
        return torch.where(seen, _split(out, q), 0.0), None
    return _split(out, q), None


def _flash_ready(q: Tensor, d_value: int) -> bool:
    ready = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return ready and q.shape[-1] == d_value and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(_merge(q), _merge(k), _merge(v), 0.0, False, attn_mask=_mask(bias, q), scale=scale)
    out, lse = _split(out, q), _split(lse, q).to(lse_dtype(q))
    if bias is not None:
        seen = (bias > -torch.inf).any(-1).expand(q.shape[2], q.shape[3])
        out, lse = torch.where(seen[..., None], out, 0.0), torch.where(seen, lse, -torch.inf)
    return out, lse


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The formula, where no backend returns its log-sum-exp."""
    wide = lse_dtype(q)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    return (p @ v.to(wide)).to(v.dtype), lse
