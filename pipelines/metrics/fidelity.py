"""Fidelity to the dense run, pixel by pixel: mse, psnr, psnr_pooled, tdiff_psnr, latent_rel_l2.

B samples, T frames, H height, W width.

Notable choices
- psnr is the mean over frames of each frame's PSNR, capped at 100 dB (identical frames); psnr_pooled takes the logarithm
  of the mean error instead, so one bad frame weighs more.
- tdiff_psnr compares frame differences x[t+1] - x[t]: it sees jitter that a per-frame number hides. NaN for images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.pipelines.metrics.metric import FunctionMetric, Meta

CAP_DB = 100.0


def decibels(mse: Tensor) -> Tensor:
    """10 log10(1 / mse) for data in [0, 1], at most 100 dB."""
    return (-10 * torch.log10(mse.double().clamp(min=10 ** (-CAP_DB / 10)))).clamp(max=CAP_DB)


def frame_mse(gen: Tensor, ref: Tensor) -> Tensor:
    """Mean square error of every frame, [B, T] float64."""
    return (gen.double() - ref.double()).square().mean(dim=(2, 3, 4))


def mse(gen: Tensor, ref: Tensor) -> Tensor:
    """Mean square error, [B]."""
    return frame_mse(gen, ref).mean(1)


def psnr(gen: Tensor, ref: Tensor) -> Tensor:
    """Mean over frames of the frame's PSNR in dB, [B]; identical videos give 100."""
    return decibels(frame_mse(gen, ref)).mean(1)


def psnr_pooled(gen: Tensor, ref: Tensor) -> Tensor:
    """PSNR in dB of the error pooled over frames, [B]."""
    return decibels(mse(gen, ref))


def tdiff_psnr(gen: Tensor, ref: Tensor) -> Tensor:
    """PSNR in dB between the frame differences of two videos, [B]; NaN for a single frame."""
    if gen.shape[1] < 2:
        return torch.full((gen.shape[0],), torch.nan, dtype=torch.float64, device=gen.device)
    return psnr(gen.diff(dim=1), ref.diff(dim=1))


def latent_rel_l2(latents: Tensor, reference: Tensor) -> Tensor:
    """|z - z*| / |z*| of the final latents, [B]."""
    error = (latents.double() - reference.double()).flatten(1).norm(dim=1)
    return error / reference.double().flatten(1).norm(dim=1).clamp(min=1e-12)


def _latents(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
    assert meta.latents is not None and meta.ref_latents is not None
    return latent_rel_l2(meta.latents, meta.ref_latents)


def _against(function):
    return lambda gen, ref, meta: function(gen, ref)


METRICS = (
    FunctionMetric("mse", "fidelity", False, _against(mse), "mean square error against dense", ("reference",)),
    FunctionMetric(
        "psnr", "fidelity", True, _against(psnr), "per-frame PSNR against dense, dB", ("reference",),
        settings={"cap_db": CAP_DB},
    ),
    FunctionMetric(
        "psnr_pooled", "fidelity", True, _against(psnr_pooled), "PSNR of the pooled error, dB", ("reference",),
        settings={"cap_db": CAP_DB},
    ),
    FunctionMetric(
        "tdiff_psnr", "fidelity", True, _against(tdiff_psnr), "PSNR of frame differences, dB", ("reference",),
        settings={"cap_db": CAP_DB},
    ),
    FunctionMetric(
        "latent_rel_l2", "fidelity", False, _latents, "relative L2 distance of the final latents", ("reference", "latents")
    ),
)  # fmt: skip
