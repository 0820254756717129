"""Mixture-of-head attention: every token picks the few heads that speak for it. For timm's vision transformers.

Letters: B batch, N tokens, C width, H heads (S shared first, then E routed), d head dim, K routed heads of a token.

``out = concat_i(w_i(x_t) o_{t,i}) W_o``. Shared heads have weights for every token; of the routed ones a token uses its K likeliest.
The weights of each group average to 1, so routers of zeros give plain multi-head attention when K = E.

* Speed: attention by queries that no one reads can be left out, and nothing else can: qkv, W_o and the keys are those of all tokens. With
  ``execution="dense"`` (the default, and what the released code does) every head is computed and multiplied, zeros included: no speed-up,
  a little slower than plain attention. With ``"sparse"`` a routed head runs only on the rows that chose it, as a list of query rows of the
  block-sparse kernel, which gathers them while loading; at best S + K of H heads' worth of attention remains. Both give the same.
  What that is worth on a GPU has not been measured. On a CPU it costs at two hundred tokens, is even at a thousand and takes a quarter
  off the layer at four thousand (docs/layers.md). Its backward loops over batch and heads on the host: train densely.
* Losses belong to a context (``BalanceLoss``), not to a class: nothing leaks from one model or step into the next.
* Names: ``wg`` chooses routed heads, ``wg_1`` weighs shared ones, ``wg_0`` weighs the two groups, as in the released code; the rest is
  timm's. With one shared head there is no ``wg_1`` and its weight is 1 (the released code calls a module it does not have).
* Compilers step around the routing of the sparse execution: one break in the graph per layer.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (Jin et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, register_notrace_module
from timm.models.vision_transformer import ATTN_LAYERS
from torch import Tensor, nn

from foveal.kernels.block_sparse import BlockPlan, block_sparse_attention
from foveal.vision.token_layer import TokenAttention

EXECUTIONS = ("dense", "sparse")
BLOCK = 128  # query rows and keys of a block
NOT_SCRIPTABLE = (
    "MixtureOfHeads cannot be turned into TorchScript, because its routing runs through operators that TorchScript cannot hold; "
    "use torch.compile or torch.export instead."
)


# ---- the sparse execution
def routed_plan(chosen: Tensor) -> BlockPlan:
    """chosen bool [B, N, E] -> a plan for q, k, v [B, E, N, d]: head e runs on the rows that chose it. Nothing waits for the device."""
    _, n, heads = chosen.shape
    device = chosen.device
    size = BLOCK if device.type == "cuda" else n  # PyTorch's own attention takes a head's rows in one call
    mine = chosen.transpose(1, 2)  # [B, E, N]
    first, key = (torch.arange(0, n, step, device=device, dtype=torch.int32) for step in (size, BLOCK))
    rows = (mine.sum(-1, dtype=torch.int32)[..., None] - first).clamp(0, size)  # the last blocks of rows are empty
    visits = torch.where(rows > 0, len(key), 0)
    return BlockPlan(
        n_queries=n, n_keys=n, q_start=first, q_len=rows, kv_start=key, kv_len=(n - key).clamp(max=BLOCK), count=visits, n_full=visits,
        index=torch.arange(len(key), device=device).expand(len(first), -1),
        q_order=(~mine).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32),
        max_q_len=min(size, n), max_kv_len=min(BLOCK, n), covers=False, kv_stride=BLOCK if len(key) > 1 else 0,
        tiled=len(key) > 1, trusted=True, label=f"rows of {heads} routed heads",
    )  # fmt: skip


@torch.compiler.disable(reason="which rows a head has is known only while it runs")
def routed_heads(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    """q, k, v [B, E, N, d], chosen bool [B, N, E] -> [B, E, N, d]: attention over all keys where chosen, 0 elsewhere."""
    return block_sparse_attention(q, k, v, routed_plan(chosen))


# ---- the loss
class BalanceLoss:
    """Collects what keeps heads evenly used, from the calls inside it::

        with BalanceLoss(model) as balance:
            logits = model(images)
        loss = cross_entropy(logits, labels) + balance.total()

    losses    one 0-d tensor per routed layer and call: E^2 mean_i(mean_t p_i mean_t m_i), which is K when all heads are used alike
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, MixtureOfHeads) and m.routed]
        self.losses: list[Tensor] = []
        self._outer: list[BalanceLoss | None] = []

    def __enter__(self) -> BalanceLoss:
        self._outer = [layer.balance for layer in self.layers]
        for layer in self.layers:
            layer.balance = self
        return self

    def __exit__(self, *_: object) -> None:
        for layer, outer in zip(self.layers, self._outer, strict=True):
            layer.balance = outer

    def total(self, weight: float = 0.01) -> Tensor:
        """``weight`` times the mean over layers. Raises ``ValueError`` when no routed layer ran inside."""
        if not self.losses:
            raise ValueError(
                "no layer with routed heads ran inside this BalanceLoss; call the model inside the with block."
            )
        return weight * torch.stack(self.losses).mean()


def balance_of(likely: Tensor, chosen: Tensor) -> Tensor:
    """likely, chosen [B, N, E] -> 0-d: how unevenly heads are used."""
    used = likely.flatten(0, 1).mean(0) * chosen.flatten(0, 1).to(likely.dtype).mean(0)
    return likely.shape[-1] ** 2 * used.mean()


# ---- the layer
@register_notrace_module
class MixtureOfHeads(TokenAttention):
    """timm's attention with routed heads: [B, N, C] -> [B, N, C]. Prefix tokens are routed like all others.

    ``timm.create_model("vit_small_patch16_224", attn_layer="foveal.moh")``, or ``attn_layer=MixtureOfHeads.with_options(shared=2, topk=3)``.

    shared      heads that every token uses; default a quarter, at least 1
    topk        routed heads that a token uses; more is denser; default: three quarters of all heads with the shared ones; 0 without routed heads
    execution   "dense" or "sparse", see above; may be changed at any time. Sparse takes no masks and no attention dropout

    Raises ``ValueError`` for heads that do not divide the width, and for ``shared`` and ``topk`` that the heads do not hold.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_norm: bool = False, scale_norm: bool = False,
        proj_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Any = None, shared: int | None = None,
        topk: int | None = None, execution: str = "dense", device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__(
            dim, num_heads, qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer, device=device, dtype=dtype,
        )  # fmt: skip
        self.shared = max(1, num_heads // 4) if shared is None else shared
        if not 0 <= self.shared <= num_heads:
            raise ValueError(f"shared is {self.shared}; of {num_heads} heads 0 to {num_heads} can be shared.")
        self.routed = num_heads - self.shared
        self.execution = execution
        self.balance: BalanceLoss | None = None
        router = lambda width: nn.Linear(dim, width, bias=False, device=device, dtype=dtype)  # noqa: E731
        self.wg = router(self.routed) if self.routed else None
        self.wg_0 = router(2) if self.routed and self.shared else None
        self.wg_1 = router(self.shared) if self.shared > 1 else None
        self.set_topk(-(-3 * num_heads // 4) - self.shared if topk is None and self.routed else topk or 0)

    def set_topk(self, topk: int) -> None:
        """Another number of routed heads for a token; a converted model starts with all and goes down."""
        lowest = 1 if self.routed else 0
        if not lowest <= topk <= self.routed:
            raise ValueError(f"topk is {topk}; choose {lowest} to {self.routed} of the {self.routed} routed heads.")
        self.topk = topk

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(NOT_SCRIPTABLE)

    @classmethod
    def from_attention(cls, attn: Attention, shared: int | None = None, topk: int | None = None) -> MixtureOfHeads:
        """A layer with the weights of timm's ``Attention`` (the same tensors) and routers of zeros, so all heads of a group weigh the same.

        topk    default all routed heads: the layer then computes what ``attn`` does. Raises ``ValueError`` for another class of attention.
        """
        if type(attn) is not Attention or getattr(attn, "gate", None) is not None:
            raise ValueError(
                f"{type(attn).__name__} cannot become MixtureOfHeads; timm's Attention without a gate can (remove an accelerate handle first)."
            )
        weight = attn.proj.weight
        heads = attn.num_heads
        groups = max(1, heads // 4) if shared is None else shared
        every = heads - groups if topk is None else topk
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        # made only for its routers: its own projections give way
        layer = cls(heads, heads, shared=groups, topk=every, device="meta")
        layer.head_dim, layer.scale = attn.head_dim, attn.scale
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"):
            setattr(layer, name, getattr(attn, name))
        for name in ("wg", "wg_0", "wg_1"):
            width = 0 if getattr(layer, name) is None else getattr(layer, name).out_features
            if width:
                setattr(layer, name, nn.Linear(attn.qkv.in_features, width, bias=False, **like))
                nn.init.zeros_(getattr(layer, name).weight)
        return layer.train(attn.training)

    def weigh(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C] -> weights of the heads [B, N, H], and which routed ones are used, bool [B, N, E], or None where none is routed."""
        weights = x.new_ones(*x.shape[:2], self.shared) if self.wg_1 is None else self.shared * _softmax(self.wg_1(x))
        if self.wg is None:
            return weights, None
        likely = _softmax(self.wg(x))
        chosen = torch.zeros_like(likely, dtype=torch.bool).scatter(-1, likely.topk(self.topk, -1).indices, True)
        if torch.is_grad_enabled() or self.balance is not None:
            # asked for or not: gradient checkpointing must find the same tensors again, maybe when the context is over
            loss = balance_of(likely, chosen)
            if self.balance is not None and torch._C._current_graph_task_id() == -1:
                self.balance.losses.append(loss)
        used = likely * chosen
        used = self.topk * used / used.sum(-1, keepdim=True).clamp_min(torch.finfo(used.dtype).eps)
        if self.wg_0 is None:
            return used, chosen
        groups = 2 * _softmax(self.wg_0(x))
        return torch.cat([groups[..., :1] * weights, groups[..., 1:] * used], -1), chosen

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        weights, chosen = self.weigh(x)
        q, k, v = self.project(x)
        if self._leaves_out(chosen, attn_mask, is_causal):
            assert chosen is not None
            q, k = q.to(v.dtype), k.to(v.dtype)  # norms may widen them under autocast
            routed = routed_heads(*(t[:, self.shared :] for t in (q, k, v)), chosen)
            shared = F.scaled_dot_product_attention(*(t[:, : self.shared] for t in (q, k, v)))  # type: ignore[arg-type]
            out = torch.cat([shared, routed], 1)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout, is_causal)
        # before any norm, so that what was left out and what is multiplied by 0 are the same to it
        return self.finish((out.transpose(1, 2) * weights[..., None].to(out.dtype)).flatten(2))

    def _leaves_out(self, chosen: Tensor | None, mask: Tensor | None, causal: bool) -> bool:
        """Does this call run sparse? Raises where it was asked for and cannot."""
        if self.execution not in EXECUTIONS:
            raise ValueError(
                f"there is no execution {self.execution!r}; choose from {', '.join(map(repr, EXECUTIONS))}."
            )
        if self.execution == "dense" or chosen is None or self.topk == self.routed:
            return False
        self.refuse_masks(mask, causal)
        if self.dropout:
            raise ValueError(
                f"attn_drop is {self.dropout} in training, which the sparse execution does not have; set execution='dense', or attn_drop=0."
            )
        return True


def _softmax(logits: Tensor) -> Tensor:
    return (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits).softmax(-1)


def mix_heads(
    model: nn.Module, shared: int | Sequence[int] | None = None, topk: int | Sequence[int] | None = None
) -> list[str]:
    """Turn every attention layer of a pretrained timm ViT into a ``MixtureOfHeads``, in place. -> names of the layers

    shared, topk    one number for all layers, or one per layer; by default the model computes what it did. As in ``from_attention``.
    Raises ``ValueError`` where no layer can be converted, or the numbers are not one per layer; the model is then as it was.
    """
    names = [name for name, m in model.named_modules() if type(m) is Attention and name]
    if not names:
        raise ValueError(f"{type(model).__name__} has no attention layer that can be converted; timm's Attention can.")
    per_layer = [_spread(label, given, len(names)) for label, given in (("shared", shared), ("topk", topk))]
    layers: list[Any] = [model.get_submodule(name) for name in names]
    made = [MixtureOfHeads.from_attention(m, s, k) for m, s, k in zip(layers, *per_layer, strict=True)]
    for name, layer in zip(names, made, strict=True):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    return names


def _spread(label: str, given: int | Sequence[int] | None, layers: int) -> list[int | None]:
    if given is None or isinstance(given, int):
        return [given] * layers
    if len(given) != layers:
        raise ValueError(
            f"{label} has {len(given)} numbers for {layers} attention layers; give one per layer, or one for all."
        )
    return list(given)


ATTN_LAYERS["foveal.moh"] = MixtureOfHeads
