"""Structural similarity, per frame, on RGB: Gaussian window sigma 1.5, 11 x 11, data range 1.

B samples, T frames, H height, W width.

Notable choices
- The settings of Wang et al. (2004) as torchmetrics applies them: population moments (no N/(N-1)), only pixels whose whole
  window lies inside the frame count. So frames need 11 pixels on each side.
- One frame stack at a time, so memory does not grow with the clip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics.metric import FunctionMetric, Meta

SIGMA, KERNEL = 1.5, 11
C1, C2 = 0.01**2, 0.03**2


def window(device: torch.device | str = "cpu") -> Tensor:
    """The normalised 1-D Gaussian, [11] float64."""
    x = torch.arange(KERNEL, dtype=torch.float64, device=device) - (KERNEL - 1) / 2
    weight = torch.exp(-(x**2) / (2 * SIGMA**2))
    return weight / weight.sum()


def blur(planes: Tensor) -> Tensor:
    """Windowed mean of [P, H, W] planes, only where the window fits: [P, H - 10, W - 10]."""
    weight = window(planes.device).to(planes.dtype)
    rows = F.conv2d(planes[:, None], weight.view(1, 1, KERNEL, 1))
    return F.conv2d(rows, weight.view(1, 1, 1, KERNEL))[:, 0]


def ssim_planes(x: Tensor, y: Tensor) -> Tensor:
    """SSIM map of [P, H, W] planes, averaged over pixels: [P]."""
    mean_x, mean_y = blur(x), blur(y)
    var_x = (blur(x * x) - mean_x * mean_x).clamp(min=0)
    var_y = (blur(y * y) - mean_y * mean_y).clamp(min=0)
    covariance = blur(x * y) - mean_x * mean_y
    top = (2 * (mean_x * mean_y) + C1) * (2 * covariance + C2)
    bottom = (mean_x * mean_x + mean_y * mean_y + C1) * (var_x + var_y + C2)
    return (top / bottom).flatten(1).mean(1)


def _metric(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
    assert ref is not None
    return ssim(gen, ref)


def ssim(gen: Tensor, ref: Tensor) -> Tensor:
    """Mean SSIM over frames and colours, [B] float64; 1 for identical videos."""
    B, T, C, H, W = gen.shape
    if min(H, W) < KERNEL:
        raise UserError(f"metric 'ssim' needs frames of at least {KERNEL} x {KERNEL} pixels; got {H} x {W}")
    frames = [
        ssim_planes(gen[:, t].double().reshape(B * C, H, W), ref[:, t].double().reshape(B * C, H, W)).view(B, C).mean(1)
        for t in range(T)
    ]
    return torch.stack(frames, 1).mean(1)


METRICS = (
    FunctionMetric(
        "ssim", "fidelity", True, _metric, "structural similarity to dense", ("reference",),
        settings={"window": "gaussian", "sigma": SIGMA, "kernel": KERNEL, "colour": "rgb"},
    ),
)  # fmt: skip
