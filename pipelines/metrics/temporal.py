"""Video quality over time without a reference and without weights.

B samples, T frames, H height, W width.

Notable choices
- `vbench.temporal_flickering` is the exact formula on 8-bit frames. VBench applies it only to clips that pass a static
  filter; we apply none and record that.
- `motion_speed` is the gradient-weighted normal flow |I_t| |grad I| / |grad I|^2 in pixels per frame: exact for a small
  translation along the gradient, an under-estimate for fast objects. A stand-in, named as ours.
- `midframe_smoothness` predicts every second frame as the average of its neighbours: (255 - mean |error|) / 255. VBench
  interpolates with a network there, so its name is not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.pipelines.metrics.metric import FunctionMetric, luma, to_bytes


def _no_motion(video: Tensor) -> Tensor:
    return torch.full((video.shape[0],), torch.nan, dtype=torch.float64, device=video.device)


def temporal_flickering(video: Tensor) -> Tensor:
    """(255 - mean over t of mean |F[t+1] - F[t]|) / 255 on 8-bit frames, [B]; 1 for a frozen video; NaN for an image."""
    if video.shape[1] < 2:
        return _no_motion(video)
    change = to_bytes(video).double().diff(dim=1).abs().mean(dim=(2, 3, 4))
    return (255 - change.mean(1)) / 255


def midframe_smoothness(video: Tensor) -> Tensor:
    """How well the average of two frames predicts the one between them, [B] in [0, 1]; NaN below three frames."""
    if video.shape[1] < 3:
        return _no_motion(video)
    frames = to_bytes(video).double()
    n = (frames.shape[1] - 1) // 2
    before, middle, after = frames[:, 0 : 2 * n : 2], frames[:, 1 : 2 * n : 2], frames[:, 2 : 2 * n + 1 : 2]
    return (255 - ((before + after) / 2 - middle).abs().mean(dim=(1, 2, 3, 4))) / 255


def motion_speed(video: Tensor) -> Tensor:
    """Gradient-weighted normal flow in pixels per frame, [B]; 0 for a frozen video; NaN for an image."""
    if video.shape[1] < 2:
        return _no_motion(video)
    y = luma(video).double()
    middle = (y[:, 1:] + y[:, :-1]) / 2
    change = y.diff(dim=1)[..., 1:-1, 1:-1].abs()
    across = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    down = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    energy = across.square() + down.square()
    total = (change * energy.sqrt()).sum(dim=(2, 3)) / energy.sum(dim=(2, 3)).clamp(min=1e-9)
    return total.mean(1)


METRICS = (
    FunctionMetric(
        "vbench.temporal_flickering", "video", True, lambda gen, ref, meta: temporal_flickering(gen),
        "VBench temporal flickering, 1 is steady", settings={"static_filter": "none"},
    ),
    FunctionMetric(
        "midframe_smoothness", "video", True, lambda gen, ref, meta: midframe_smoothness(gen),
        "predictability of middle frames", faithful=False,
    ),
    FunctionMetric(
        "motion_speed", "video", True, lambda gen, ref, meta: motion_speed(gen),
        "normal flow, pixels a frame", faithful=False,
    ),
)  # fmt: skip
