"""Seams at tile borders: the artefact that block, tile and window attention can leave and that PSNR hardly sees.

B samples, T frames, H height, W width.

Notable choices
- The strength of edges at tile borders over the strength elsewhere, divided by the same ratio of the dense video, minus 1.
  0 means no extra seams; above 0.05 is a provisional, uncalibrated warning level.
- A tile that covers the frame has no border inside it: that axis is left out, and with no axis left the number is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.pipelines.metrics.metric import FunctionMetric, Meta, luma

EPS = 1e-4


def border_ratio(plane: Tensor, dim: int, edge: int) -> Tensor | None:
    """Mean |difference| across borders of tiles `edge` long over the mean elsewhere, [B]; None without both kinds."""
    steps = plane.shape[dim] - 1
    if steps < 1:
        return None
    gradient = plane.diff(dim=dim).abs().movedim(dim, -1).flatten(1, -2).mean(1)  # [B, steps]
    border = (torch.arange(1, steps + 1, device=plane.device) % edge) == 0
    if not border.any() or border.all():
        return None
    return gradient[:, border].mean(1) / (gradient[:, ~border].mean(1) + EPS)


def tile_seam(gen: Tensor, ref: Tensor, tile: tuple[int, int, int] | None, axes: tuple[int, ...] = (1, 2)) -> Tensor:
    """Extra seam strength against dense, averaged over `axes` (0 time, 1 height, 2 width), [B]; NaN where no border exists."""
    missing = torch.full((gen.shape[0],), torch.nan, dtype=torch.float64, device=gen.device)
    if tile is None:
        return missing
    y, y_ref = luma(gen).double(), luma(ref).double()
    values = []
    for axis in axes:
        here, there = border_ratio(y, axis + 1, tile[axis]), border_ratio(y_ref, axis + 1, tile[axis])
        if here is not None and there is not None:
            values.append((here + EPS) / (there + EPS) - 1)
    return torch.stack(values).mean(0) if values else missing


def _seam(axes: tuple[int, ...]):
    def function(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
        assert ref is not None
        return tile_seam(gen, ref, meta.tile, axes)

    return function


METRICS = (
    FunctionMetric(
        "tile_seam", "fidelity", False, _seam((1, 2)), "extra edges at tile borders, 0 is none", ("reference", "tile"),
        settings={"warning_level": 0.05, "calibrated": False},
    ),
    FunctionMetric(
        "tile_seam_time", "fidelity", False, _seam((0,)), "extra change at temporal tile borders", ("reference", "tile"),
        settings={"warning_level": 0.05, "calibrated": False},
    ),
)  # fmt: skip
