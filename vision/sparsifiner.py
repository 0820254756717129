"""Sparsifiner: a cheap low-rank guess of the attention decides which keys each query attends to. Per token as published, and per block.

Letters: B batch, h heads, N tokens, P prefix tokens, D width, d head dim, r rank, R query rows and M keys of a guess, C blocks.

* Guess: queries and keys shrunk to d/2 channels, keys to r mixtures of tokens; the softmax over mixtures weighs r learned attention rows.
* Two phases. In the first (training only) attention is dense and the raw guess learns to be the attention (``reconstruction_loss``). In the
  second, and in evaluation, the largest coefficients and the larger basis entries remain and each query keeps its best keys. What is
  kept carries no gradient.
* Prefix queries see everything. In the published form prefix keys compete like others; N is fixed by the weights.
* The published form is a reference: masks per query and key save nothing on a GPU. ``block`` guesses between blocks of that many tokens and
  runs the block-sparse kernel. That variant is ours, meant for 4096 tokens and more; no accuracy is claimed for it.
* The scale of the guess is h ** -0.5, the number of heads, as in the released code.

Source: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (Wei et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.kernels.block_sparse import BlockPlan, block_sparse_attention
from foveal.kernels.selection.keeping import keep_top_k
from foveal.kernels.selection.lists import block_lists, top_k_lists
from foveal.kernels.selection.pooling import pool_blocks
from foveal.vision.token_layer import Plane, TokenAttention


class ConnectivityPredictor(nn.Module):
    """Queries [B, h, R, d] and keys [B, h, M, d] -> guessed attention [B, h, R, M], differentiable; M is fixed.

    keys           M, tokens or blocks
    rank           r; default a sixth of M (32 for 197 tokens), at least 1
    coefficients   of r that stay outside phase 1; threshold: basis entries up to it count as 0 there
    """

    def __init__(
        self, head_dim: int, num_heads: int, keys: int, rank: int | None = None, coefficients: int = 8, threshold: float = 0.02,
        device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        rank = max(1, keys // 6) if rank is None else rank
        if keys < 1 or rank < 1 or coefficients < 1:
            raise ValueError(f"keys {keys}, rank {rank} and coefficients {coefficients} must each be at least 1.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.keys, self.scale, self.threshold = keys, num_heads**-0.5, threshold
        self.coefficients = min(coefficients, rank)
        self.proj_c_q = nn.Linear(head_dim, max(1, head_dim // 2), **dd)
        self.proj_c_k = nn.Linear(head_dim, max(1, head_dim // 2), **dd)
        self.proj_n = nn.Parameter(torch.empty(keys, rank, **dd))
        self.proj_back_n = nn.Parameter(torch.empty(keys, rank, **dd))
        for weight in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, q: Tensor, k: Tensor, reconstruct: bool = False) -> Tensor:
        """reconstruct: the raw guess of phase 1"""
        if k.shape[2] != self.keys:
            raise ValueError(
                f"the guess is learned for {self.keys} keys and there are {k.shape[2]}; make the layer for this many tokens, or use block=."
            )
        mixed = self.proj_c_k(k).mT @ self.proj_n  # [B, h, d/2, r]
        weight = (self.proj_c_q(q) @ mixed * self.scale).softmax(-1)
        basis = self.proj_back_n.mT
        if not reconstruct:
            best = weight.topk(self.coefficients, -1)
            weight = torch.zeros_like(weight).scatter(-1, best.indices, best.values)
            basis = F.threshold(basis.abs(), self.threshold, 0.0)
        return weight @ basis.to(weight.dtype)


def connectivity(scores: Tensor, keep: float, prefix: int = 0) -> Tensor:
    """scores [B, h, N - P, N] -> bool [B, h, N, N], no gradient: each query's ceil(keep * N) best keys, everything for prefix queries."""
    check_keep(keep)
    chosen = keep_top_k(scores.detach(), math.ceil(keep * scores.shape[-1]))
    return F.pad(chosen, (0, 0, prefix, 0), value=True)


@torch.no_grad()
def block_connectivity(
    q: Tensor, k: Tensor, predictor: ConnectivityPredictor, *, block: int = 64, keep: float = 0.25, prefix: int = 0
) -> BlockPlan:
    """The same between blocks of consecutive tokens (ours): a plan for the block-sparse kernel.

    q, k        [B, h, N, d]; predictor: for ceil(N / block) keys
    block       64 as planned for 4096 tokens; 128 fills the tiles of the GPU kernels
    keep        share of the blocks that each query block visits, rounded up
    prefix      lead tokens that see, and are seen by, everything; so do the other tokens of their blocks

    -> BlockPlan [B, h]; nothing waits for the device.
    """
    scores = block_scores(q, k, predictor, block)
    n, blocks = q.shape[2], scores.shape[-1]
    check_keep(keep)
    ahead = min(blocks, -(-prefix // block))
    most = math.ceil(keep * blocks)
    if ahead:
        chosen = keep_top_k(scores, most)
        chosen[..., :ahead] = True
        lists = block_lists(chosen, width=min(blocks, most + ahead))
    else:
        lists = top_k_lists(scores, most)
    start, length = _blocks(n, block, q.device)
    return BlockPlan(
        n_queries=n, n_keys=n, q_start=start, q_len=length, kv_start=start, kv_len=length, count=lists.count, n_full=lists.count,
        index=lists.index, dense_rows=((0, ahead),) if ahead else (), max_q_len=min(n, block), max_kv_len=min(n, block), covers=True,
        kv_stride=block if blocks > 1 else 0, tiled=blocks > 1, spread=None if ahead else 0.0, trusted=True, label=f"sparsifiner blocks of {block}, keep {keep:g}",
    )  # fmt: skip


def block_scores(
    q: Tensor, k: Tensor, predictor: ConnectivityPredictor, block: int, reconstruct: bool = False
) -> Tensor:
    """Guessed attention between blocks, fp32 [B, h, C, C], from mean queries and keys; only the predictor gets a gradient."""
    start, length = _blocks(q.shape[2], block, q.device)
    longest = min(block, q.shape[2])
    like = predictor.proj_n.dtype
    means = [pool_blocks(x, start, length, max_length=longest).mean.to(like) for x in (q, k)]
    return predictor(means[0], means[1], reconstruct).float()


def _blocks(n: int, block: int, device: Any) -> tuple[Tensor, Tensor]:
    if block < 1:
        raise ValueError(f"block is {block}; a block has at least 1 token.")
    start = torch.arange(0, n, block, dtype=torch.int32, device=device)
    return start, (n - start).clamp(max=block)


def check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; the share of keys to keep lies in (0, 1], and 1 is dense attention.")


@torch.compiler.disable(reason="which blocks are chosen is known only while it runs")
def _attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    predictor: ConnectivityPredictor,
    block: int,
    keep: float,
    prefix: int,
    scale: float,
) -> Tensor:
    plan = block_connectivity(q, k, predictor, block=block, keep=keep, prefix=prefix)
    return block_sparse_attention(q, k, v, plan, scale=scale)


class SparsifinerAttention(TokenAttention):
    """Attention over guessed connections, ``attn_layer=SparsifinerAttention.with_options(tokens=197)``: [B, N, D] -> [B, N, D].

    num_heads .. norm_layer   as timm's ``Attention``
    tokens         N with the prefix tokens, fixed by the weights (with ``block``: any N of as many blocks)
    keep           share of the keys that stay
    block          None: the published form, a mask per query and key. A number: blocks of so many tokens through the block-sparse kernel
    rank, coefficients, threshold   see ``ConnectivityPredictor``
    phase          1 or 2, see above; ``set_phase(model, 1)`` changes it
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, qk_norm: bool = False, scale_norm: bool = False,
        proj_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, num_prefix_tokens: int = 0,
        device: Any = None, dtype: Any = None, tokens: int | None = None, keep: float = 0.25, block: int | None = None,
        rank: int | None = None, coefficients: int = 8, threshold: float = 0.02, phase: int = 2,
    ):  # fmt: skip
        super().__init__(
            dim, num_heads, qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer, num_prefix_tokens, device, dtype
        )  # fmt: skip
        check_keep(keep)
        check_phase(phase)
        if tokens is None:
            raise ValueError(
                "the guess is learned for one number of tokens; give it, as in SparsifinerAttention.with_options(tokens=197)."
            )
        if block is not None and block < 1:
            raise ValueError(f"block is {block}; a block has at least 1 token.")
        self.keep, self.block, self.phase = keep, block, phase
        keys = tokens if block is None else -(-tokens // block)
        self.mask_predictor = ConnectivityPredictor(
            self.head_dim, num_heads, keys, rank, coefficients, threshold, device, dtype
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid: Plane | None = None
    ) -> Tensor:
        self.refuse_masks(attn_mask, is_causal)
        prefix, _ = self.locate(x.shape[1], grid)
        q, k, v = self.project(x)
        if self.training and self.phase == 1:
            self.guess(q, k, prefix)  # for those who record it
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, scale=self.scale)
        elif self.block is None:
            mask = connectivity(self.guess(q, k, prefix), self.keep, prefix)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout, scale=self.scale)
        elif self.dropout:
            raise ValueError(
                f"the block-sparse kernel has no dropout and attn_drop is {self.dropout}; set it to 0, or train with block=None."
            )
        else:
            out = _attend_blocks(q, k, v, self.mask_predictor, self.block, self.keep, prefix, self.scale)
        return self.finish(out.transpose(1, 2).flatten(2))

    def guess(self, q: Tensor, k: Tensor, prefix: int) -> Tensor:
        """Guessed attention: [B, h, N - P, N], or [B, h, C, C] between blocks."""
        reconstruct = self.training and self.phase == 1
        if self.block is not None:
            return block_scores(q, k, self.mask_predictor, self.block, reconstruct)
        return self.mask_predictor(q[:, :, prefix:], k, reconstruct)


def check_phase(phase: int) -> None:
    if phase not in (1, 2):
        raise ValueError(
            f"phase is {phase}; 1 (dense, the guess learns) or 2 (sparse, everything else learns) is needed."
        )


def set_phase(model: nn.Module, phase: int) -> nn.Module:
    """Put all Sparsifiner layers of a model in phase 1 or 2. Returns the model."""
    check_phase(phase)
    for module in model.modules():
        if isinstance(module, SparsifinerAttention):
            module.phase = phase
    return model


@contextmanager
def recorded_guesses(model: nn.Module) -> Iterator[list[Tensor]]:
    """``with recorded_guesses(student) as guesses: student(x)``: what each layer guessed, in order, with gradients."""
    guesses: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: guesses.append(out))
        for module in model.modules()
        if isinstance(module, ConnectivityPredictor)
    ]
    try:
        yield guesses
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """``with recorded_attention(teacher) as maps: teacher(x)``: softmax attention [B, h, N, N] of each layer named like timm's ``Attention``."""
    maps: list[Tensor] = []

    def see(layer: Any, inputs: tuple[Any, ...]) -> None:
        q, k, _ = layer.qkv(inputs[0]).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        maps.append((layer.q_norm(q) @ layer.k_norm(k).mT * layer.scale).softmax(-1))

    parts = ("qkv", "q_norm", "k_norm", "num_heads", "scale")
    layers = [m for m in model.modules() if all(hasattr(m, part) for part in parts)]
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def reconstruction_loss(guess: Tensor, attention: Tensor, block: int | None = None) -> Tensor:
    """Phase 1's loss of one layer: squared differences, summed. Published: 0.01 times the mean over layers.

    guess [B, h, R, M] as a layer makes it; attention [B, h, N, N] of the teacher, for blocks summed over keys and averaged over queries.
    """
    if block is not None:
        missing = -attention.shape[-1] % block
        keys = F.pad(attention, (0, missing)).unflatten(-1, (-1, block)).sum(-1)
        length = _blocks(attention.shape[-1], block, attention.device)[1]
        attention = F.pad(keys, (0, 0, 0, missing)).unflatten(-2, (-1, block)).sum(-2) / length[:, None]
    return F.mse_loss(guess, attention[..., attention.shape[-2] - guess.shape[-2] :, :], reduction="sum")
