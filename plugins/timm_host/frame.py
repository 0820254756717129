"""Facts of one model call that hold for all its attention layers: the grid, or the grids of a batch of different pictures.

Letters: B batch, N padded patches of a NaFlex batch, P prefix tokens.

* A NaFlex batch holds pictures of different grids, padded at the end. Samples of one grid make a group, and each group is one call
  of the method on its real tokens; padding attends to nothing and is attended by nothing.
* Patch coordinates are read from the device once per model call, as timm itself does.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from foveal.plugins.order import Order
from foveal.plugins.timm_host.recognise import embedding

Plane = tuple[int, int]  # rows, columns of patches
NO_CALL = "attention outside a call of the whole model"
NO_GRID = "the input shows no grid of patches"
MASKED = "an attention mask given to the model"
CAUSAL = "causal attention"
DROPPED = "patch dropout leaves no grid"
SCATTERED = "patches of a sample are not a whole grid in reading order, padded at the end"


@dataclass(frozen=True, eq=False)
class Group:
    """Samples of one grid. rows: their places in the batch, int64; None: all of them, without padding."""

    grid: Plane
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Frame:
    """One model call.

    reason         why every layer of it runs dense
    masks_padding  the model's attention mask says which patches are padding, and nothing else
    order          what the tokens have been put in, once for the whole call
    """

    groups: tuple[Group, ...] = ()
    prefix: int = 0
    reason: str = ""
    masks_padding: bool = False
    order: Order | None = None

    @property
    def padded(self) -> bool:
        return any(group.rows is not None for group in self.groups)

    # ---- tokens, prefix first
    def arrange(self, x: Tensor) -> Tensor:
        """[B, P + N, C] in the model's order -> in ``order``"""
        return x if self.order is None else x.index_select(1, _index(self.order.on(x.device), self.prefix, False))

    def restore(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(1, _index(self.order.on(x.device), self.prefix, True))

    def arrange_rope(self, rope: Tensor) -> Tensor:
        """[.., N, 2 D], patches only"""
        return rope if self.order is None else self.order.permute(rope, -2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: what is made for inference first may be trained through later
def _index(order: Order, prefix: int, back: bool) -> Tensor:
    lead = torch.arange(prefix, device=order.token.device)
    return torch.cat((lead, (order.inverse if back else order.token) + prefix))


class _Now(threading.local):
    """The frame of the call under way in this thread; ``plane``: the grid in a graph that is being compiled."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.root: object = None
        self.plane: Plane | None = None


NOW = _Now()


def frame_of(model: Any, call: Mapping[str, Any]) -> Frame:
    """Where the tokens of a call lie. Never raises for an odd call: no groups, and the reason."""
    image = next(iter(call.values()), None)
    if isinstance(image, dict):
        call = {**call, **image, "x": image["patches"]}
        image = image["patches"]
    prefix = model.num_prefix_tokens
    drop = getattr(model, "patch_drop", None)
    if call.get("attn_mask") is not None:
        return Frame(prefix=prefix, reason=MASKED)
    if call.get("is_causal"):
        return Frame(prefix=prefix, reason=CAUSAL)
    if model.training and getattr(drop, "prob", 0):
        return Frame(prefix=prefix, reason=DROPPED)
    if isinstance(call.get("patch_coord"), Tensor):
        groups = groups_of(call["patch_coord"], call.get("patch_valid"))
        return Frame(groups or (), prefix, "" if groups else SCATTERED, masks_padding=True)
    plane = plane_of(model, image)
    return Frame(prefix=prefix, reason=NO_GRID) if plane is None else Frame((Group(plane),), prefix)


def plane_of(model: Any, image: Any) -> Plane | None:
    """The grid of a picture [B, C, H, W]."""
    embed: Any = embedding(model)
    if not isinstance(image, Tensor) or image.ndim != 4:
        return None
    if not hasattr(embed, "dynamic_feat_size"):
        return embed.grid_size
    rows, columns = embed.dynamic_feat_size(tuple(image.shape[2:]))
    return rows, columns


def groups_of(coord: Tensor, valid: Tensor | None) -> tuple[Group, ...] | None:
    """coord [B, N, 2] (row, column), valid bool [B, N] -> samples by grid, or None where one has no whole grid."""
    places = coord.cpu()
    real = torch.ones(places.shape[:2], dtype=torch.bool) if valid is None else valid.bool().cpu()
    by_grid: dict[Plane, list[int]] = {}
    for sample in range(places.shape[0]):
        n = int(real[sample].sum())
        rows, columns = (int(x) + 1 for x in places[sample, :n].amax(0)) if n else (0, 0)
        raster = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).view(-1, 2)
        if (
            n == 0
            or not real[sample, :n].all()
            or rows * columns != n
            or not torch.equal(places[sample, :n].long(), raster)
        ):
            return None
        by_grid.setdefault((rows, columns), []).append(sample)
    if len(by_grid) == 1 and bool(real.all()):
        return (Group(next(iter(by_grid))),)
    return tuple(Group(g, torch.tensor(rows, device=coord.device)) for g, rows in by_grid.items())
