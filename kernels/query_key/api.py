"""Queries and keys made ready for attention: norm, rotation, token order, and the place in the joint sequence, in one pass.

Letters: B batch, H heads, N tokens, D head dim, P places in the output.

* Inference only: nothing here is differentiated. ``refusal`` says why the kernel cannot take a call; the caller then keeps its own
  operations, and ``norm_and_rotate`` runs plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.block_sparse.needs import FLOATS, Needs
from foveal.kernels.query_key.parts import Norm, Rotation
from foveal.kernels.query_key.reference import finished

Pair = tuple[Tensor, Tensor]
TRITON = Needs(
    devices=("cuda",),
    dtypes=FLOATS,
    head_dim=(16, 256),
    capability=(8, 0),
    requires="triton",
    note="one pass over q and k",
)


def norm_and_rotate(
    q: Tensor, k: Tensor, norms: tuple[Norm, Norm], rotation: Rotation | None = None, *, order: Tensor | None = None,
    out: Pair | None = None, implementation: str | None = None,
) -> Pair:  # fmt: skip
    """Norm q and k, then rotate them.

    q, k            [B, N, H, D] views of projections
    norms           of q and of k
    rotation        None: no position (HunyuanVideo's text)
    order           int [P]: place p of the output takes token order[p], with that token's rotation; None: as they are
    out             tensors [B, P, H, D] to write into, such as parts of a joint sequence; None: new ones
    implementation  "triton" or "torch"; None: "triton" where it takes the call
    -> q, k [B, P, H, D]
    Raises ValueError for another implementation, and where "triton" is asked for and cannot.
    """
    why = refusal(q, k, norms, rotation, out, by_name=implementation is not None)
    if implementation not in (None, "triton", "torch") or (implementation == "triton" and why):
        reason = f"triton cannot take this call: {why}" if why else f"there is no implementation {implementation!r}"
        raise ValueError(f"{reason}; leave implementation out, or choose torch.")
    places = q.shape[1] if order is None else order.shape[0]
    if implementation == "torch" or why:
        made = finished(q, norms[0], rotation, order), finished(k, norms[1], rotation, order)
        return made if out is None else (out[0].copy_(made[0]), out[1].copy_(made[1]))
    from foveal.kernels.query_key.portable import launch

    b, _, h, d = q.shape
    out = out or (q.new_empty(b, places, h, d), q.new_empty(b, places, h, d))
    launch(q, k, norms, rotation, order, out)
    return out


def refusal(
    q: Tensor, k: Tensor, norms: tuple[Norm, Norm], rotation: Rotation | None, out: Pair | None = None, by_name: bool = False
) -> str | None:  # fmt: skip
    """Why the kernel cannot take a call, or None. by_name: Triton's interpreter may run it."""
    why = TRITON.refusal(q, by_name)
    if why is not None:
        return why
    d = q.shape[3]
    if d & (d - 1):
        return f"head_dim {d} is not a power of two"
    if q.shape != k.shape or q.dtype != k.dtype:
        return "queries and keys differ in shape or dtype"
    if any(x.stride(3) != 1 or x.stride(2) != d for x in (q, k, *(out or ()))):
        return "the heads of a token do not lie together"
    return _norms(q, norms) or _rotation(q, rotation)


def _norms(q: Tensor, norms: tuple[Norm, Norm]) -> str | None:
    first, second = norms
    if (first.across, first.twice, first.weight is None) != (second.across, second.twice, second.weight is None):
        return "the norms of queries and keys differ in kind"
    width = q.shape[2] * q.shape[3] if first.across else q.shape[3]
    for weight in (first.weight, second.weight):
        if weight is None:
            continue
        if weight.dtype != q.dtype or weight.device != q.device:
            return f"the norm's weight is {weight.dtype} on {weight.device.type}, the queries are {q.dtype} on {q.device.type}"
        if tuple(weight.shape) != (width,) or not weight.is_contiguous():
            return f"the norm's weight has shape {tuple(weight.shape)}, not ({width},)"
    return None


def _rotation(q: Tensor, rotation: Rotation | None) -> str | None:
    for table in () if rotation is None else (rotation.cos, rotation.sin):
        if table.dtype != torch.float32 or table.device != q.device:
            return f"the rotation's table is {table.dtype} on {table.device.type}; it must be torch.float32 on {q.device.type}"
        if tuple(table.shape) != (q.shape[1], q.shape[3]) or table.stride(1) != 1:
            return f"the rotation's table has shape {tuple(table.shape)}, not ({q.shape[1]}, {q.shape[3]})"
    return None
