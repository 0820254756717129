"""Multi-head scan: gated linear attention along four routes over the picture, each head along routes of its own.

Letters: B batch, N tokens (P prefix tokens first, then rows H by columns W), D width, h heads, K key and value width of a head.

A route is an order of the patches. A pattern is two routes; with their reverses they are the four directions of a head. Outputs are put
back in place and fused: their mean, or their sum times how much the four disagree (coefficient of variation).

* Routes are token orders and nothing else: any grid, any recurrence that reads tokens in turn can use ``scan_route``.
* The layer is ViG's mixer with more routes: a depth-wise convolution, then queries, keys, values, gates and mix from what it gives. Queries,
  keys and values are shared by the directions; each direction has log gates of its own. The paper runs a Mamba there, we do not.
* Prefix tokens bypass the convolution and stand at the start of every route: patches see them on the way, they see all patches on the
  way back, and nothing is mixed into them.
* Orders are applied by gathering q, k, v and gates: two copies of each, one per route. Cost is linear in N; no speed is claimed.
* Weights of plain ViTs load (qkv, proj and norms keep timm's names), as a start for training: softmax is gone, so they do not give its result.
* Compilers step around the making of the orders: one break in the graph per layer.

Sources: "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba" (Ji, 2024), routes and fusion; "ViG: Linear-complexity Visual
Sequence Learning with Gated Linear Attention", the mixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models.vision_transformer import ATTN_LAYERS
from torch import Tensor, nn

from foveal.kernels.gated_linear import bidirectional_gated_linear_attention, gated_linear_attention
from foveal.kernels.order import take_tokens
from foveal.vision.token_layer import Plane, TokenAttention
from foveal.vision.vig_mixer import RMSNorm

ROUTES = ("row", "col", "serp_row", "serp_col", "diag", "antidiag", "spiral", "antispiral")
PATTERNS = {
    "serpentine": ("serp_row", "serp_col"), "diagonal": ("diag", "antidiag"), "spiral": ("spiral", "antispiral"), "raster": ("row", "col"),
}  # fmt: skip
FUSIONS = ("mean", "variation")
EPSILON = 1e-5  # of the coefficient of variation


# ---- routes
def scan_route(kind: str, height: int, width: int) -> Tensor:
    """int64 [height width]: row-major places of the patches, in the order in which they are visited.

    row, col           line by line, each from its start
    serp_row, serp_col line by line, every other one backwards
    diag, antidiag     diagonals from the upper left (right) corner, every other one backwards
    spiral, antispiral from the upper left (right) corner inwards

    Raises ``ValueError`` for an unknown kind or an empty grid.
    """
    if kind not in ROUTES:
        raise ValueError(f"there is no scan route {kind!r}; choose from {', '.join(map(repr, ROUTES))}.")
    if height < 1 or width < 1:
        raise ValueError(f"the grid is {height} by {width}; at least one patch is needed.")
    places = torch.arange(height * width).view(height, width)
    if kind.startswith("anti"):
        places, kind = places.flip(1), kind.removeprefix("anti")
    if kind.endswith("col"):
        places, kind = places.T, kind.replace("col", "row")
    if kind == "row":
        return places.flatten()
    make = {"serp_row": _serpentine, "diag": _diagonals, "spiral": _spiral}[kind]
    return make(places)


def _serpentine(places: Tensor) -> Tensor:
    return torch.cat([row.flip(0) if i % 2 else row for i, row in enumerate(places)])


def _diagonals(places: Tensor) -> Tensor:
    height, width = places.shape
    # flipped, the diagonal through (0, s) is one that ``diagonal`` knows; it comes from the top right down
    lines = [places.flip(1).diagonal(width - 1 - s) for s in range(height + width - 1)]
    return torch.cat([line if s % 2 else line.flip(0) for s, line in enumerate(lines)])


def _spiral(places: Tensor) -> Tensor:
    turns = []
    while places.numel():
        turns.append(places[0])
        places = places[1:].T.flip(0)
    return torch.cat(turns)


@torch.compiler.disable(reason="orders are made on the host, once per grid")
def head_orders(
    patterns: Sequence[str], heads: int, plane: Plane, prefix: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The orders of all heads' first routes, then of their second ones, and their inverses. -> int64 [1, 2 h, N] twice

    Head i takes pattern i modulo their number. Prefix tokens come first. Cached.
    """
    return _orders(tuple(patterns), heads, *plane, prefix, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: what is made for inference first may be trained through later
def _orders(
    patterns: tuple[str, ...], heads: int, height: int, width: int, prefix: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    routes = {kind: scan_route(kind, height, width) for name in patterns for kind in PATTERNS[name]}
    lead = torch.arange(prefix)
    kinds = [PATTERNS[patterns[i % len(patterns)]][side] for side in (0, 1) for i in range(heads)]
    order = torch.stack([torch.cat([lead, prefix + routes[kind]]) for kind in kinds])[None]
    return order.to(device), order.argsort(-1).to(device)


# ---- fusion
def fuse(parts: Sequence[Tensor], fusion: str, threshold: float = 0.0) -> Tensor:
    """Outputs of the directions, of one shape -> one of that shape.

    mean        their mean
    variation   their sum times ``relu(std / (mean(part - least part) + 1e-5) - threshold)``, element by element: what they agree on goes
    """
    if fusion == "mean":
        return sum(parts[1:], parts[0]) / len(parts)
    if fusion != "variation":
        raise ValueError(f"there is no fusion {fusion!r}; choose from {', '.join(map(repr, FUSIONS))}.")
    stacked = torch.stack(list(parts))
    above = (stacked - stacked.amin(0)).mean(0)
    return stacked.sum(0) * F.relu(stacked.std(0) / (above + EPSILON) - threshold)


# ---- the layer
@register_notrace_module
class ScanAttention(TokenAttention):
    """A token mixer in place of timm's attention: [B, N, D] -> [B, N, D], linear in N.

    ``model = bind_grid(timm.create_model("vit_small_patch16_224", attn_layer="foveal.scan"))``, or
    ``attn_layer=ScanAttention.with_options(patterns=("diagonal",), fusion="variation")``.

    patterns    of "serpentine", "diagonal", "spiral", "raster": head i takes number i modulo how many there are
    fusion      "mean" or "variation", see ``fuse``
    threshold   of the variation; more leaves less
    gate_rank   width of the bottleneck of the gates' projection
    temper      log gates are divided by it: at logit 0 a token fades to half over ``temper`` tokens

    Raises ``ValueError`` for heads that do not divide D, unknown names, more patterns than heads, and attention dropout (a scan has no
    attention weights to drop); ``NotImplementedError`` for masks.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_norm: bool = False, scale_norm: bool = False,
        proj_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, num_prefix_tokens: int = 0,
        patterns: Sequence[str] = ("serpentine", "diagonal", "spiral"), fusion: str = "mean", threshold: float = 0.0,
        gate_rank: int = 16, temper: float = 16.0, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__(
            dim, num_heads, qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer, num_prefix_tokens, device, dtype,
        )  # fmt: skip
        _check(num_heads, patterns, fusion, attn_drop)
        dd = {"device": device, "dtype": dtype}
        self.patterns, self.fusion, self.threshold, self.temper = tuple(patterns), fusion, threshold, temper
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.gk_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False, **dd), nn.Linear(gate_rank, 4 * dim, **dd))
        self.g_proj = nn.Linear(dim, dim, **dd)
        self.g_norm, self.l_norm = RMSNorm(self.head_dim, **dd), RMSNorm(self.head_dim, **dd)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.refuse_masks(attn_mask, is_causal)
        prefix, plane = self.locate(x.shape[1])
        x = self._convolved(x, prefix, plane)
        seen = self.g_norm(self._scan(x, prefix, plane).transpose(1, 2))
        near = self.l_norm(x.unflatten(-1, (self.num_heads, -1)))
        mix = self.g_proj(x).sigmoid().unflatten(-1, (self.num_heads, -1))
        if prefix:  # they have no neighbours
            mix = torch.cat([torch.ones_like(mix[:, :prefix]), mix[:, prefix:]], 1)
        return self.finish((mix * seen.to(near.dtype) + (1 - mix) * near).flatten(2))

    def _convolved(self, x: Tensor, prefix: int, plane: Plane) -> Tensor:
        patches = self.local(x[:, prefix:].transpose(1, 2).unflatten(2, plane)).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :prefix].to(patches.dtype), patches], 1) if prefix else patches

    def _scan(self, x: Tensor, prefix: int, plane: Plane) -> Tensor:
        """x [B, N, D] -> [B, h, N, K], in place."""
        order, inverse = head_orders(self.patterns, self.num_heads, plane, prefix, x.device)
        q, k, v = self.project(x)
        q, k, v = (take_tokens(torch.cat([t, t], 1), order) for t in (q.to(v.dtype), k.to(v.dtype), v))
        ahead, back = (take_tokens(gate, order) for gate in self._gates(x))
        if self.fusion == "mean":
            both = bidirectional_gated_linear_attention(q, k, v, ahead, back, scale=0.25 * self.scale)
            return sum(take_tokens(both, inverse).chunk(2, 1))  # type: ignore[return-value]
        parts = [
            gated_linear_attention(q, k, v, g, scale=self.scale, reverse=r) for g, r in ((ahead, False), (back, True))
        ]
        return fuse([y for part in parts for y in take_tokens(part, inverse).chunk(2, 1)], self.fusion, self.threshold)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Natural logs, at most 0, fp32 or wider. -> ahead and back, each [B, 2 h, N, K]: first routes, then second ones"""
        logits = self.gk_proj(x)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        gates = F.logsigmoid(logits) / self.temper
        ahead, back = gates.unflatten(-1, (2, 2 * self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return ahead, back


def _check(heads: int, patterns: Sequence[str], fusion: str, attn_drop: float) -> None:
    if isinstance(patterns, str) or not patterns or any(name not in PATTERNS for name in patterns):
        raise ValueError(f"patterns is {patterns!r}; give a list of {', '.join(map(repr, PATTERNS))}.")
    if len(patterns) > heads:
        raise ValueError(f"{len(patterns)} patterns for {heads} heads; give at most one per head.")
    if fusion not in FUSIONS:
        raise ValueError(f"there is no fusion {fusion!r}; choose from {', '.join(map(repr, FUSIONS))}.")
    if attn_drop:
        raise ValueError(
            f"attn_drop is {attn_drop}; a scan has no attention weights to drop, so leave it at 0 (proj_drop works)."
        )


ATTN_LAYERS["foveal.scan"] = ScanAttention
