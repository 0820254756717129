"""The first convolution of a stem with its layer norm and SiLU in one launch, for inference.

Letters: B batch, C channels of the image, K kernel size, D channels of the output.

Notable choices: PyTorch's way copies a wide image into another layout first, which takes longer than everything else in a stem; here the
image is read where it lies, and the output lies as tokens do: channels last.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.token_mixing import dispatch
from foveal.kernels.token_mixing.launching import Form, Operator, ceil

WIDEST = 256
HALF = (torch.float16, torch.bfloat16)


def patch_conv(
    image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, padding: int, eps: float = 1e-5,
    *, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """``silu(layer_norm(conv2d(image)))``, the norm over channels. image [B, C, H, W], weight [D, C, K, K] -> [B, D, h, w], channels last.

    bias, norm_weight, norm_bias [D]. One launch where ``takes_patch_conv`` says so or it is asked for by name, and then not differentiable.
    """
    tensors = (image, weight, bias, norm_weight, norm_bias)
    if implementation is None:
        whole = takes_patch_conv(*tensors)
    else:
        whole = dispatch.fused(implementation, *tensors)
        if whole and dispatch.learns(*tensors):
            raise ValueError(
                "the triton implementation cannot take this call: gradients are wanted; leave implementation out."
            )
    if whole:
        return _operator(*tensors, stride, padding, eps).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight, bias, stride, padding).permute(0, 2, 3, 1)
    return F.silu(F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)).permute(0, 3, 1, 2)


def takes_patch_conv(image: Tensor, *weights: Tensor) -> bool:
    """Whether the one launch is made for these: no gradients, one half precision throughout, an output of few channels."""
    if image.dtype not in HALF or weights[0].shape[0] > WIDEST or not dispatch.fused(None, image):
        return False
    return all(t.dtype == image.dtype for t in weights) and not dispatch.learns(image, *weights)


def _size(side: int, k: int, stride: int, padding: int) -> int:
    return (side + 2 * padding - k) // stride + 1


@functools.lru_cache(maxsize=64)
def _form(channels: int, k: int, stride: int, padding: int, d: int, full: bool) -> Form:
    from foveal.kernels.token_mixing.stem_kernel import convolve_patches

    shape = {
        "C": channels,
        "K": k,
        "S": stride,
        "P": padding,
        "D": d,
        "DP": max(16, 1 << (d - 1).bit_length()),
        "BT": 128,
        "BL": 64,
    }
    return Form(convolve_patches, shape | {"PRODUCT": "tf32x3" if full else "ieee"}, num_warps=8, num_stages=2)


def _run(
    image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, padding: int, eps: float
) -> Tensor:  # fmt: skip
    image = image if image.stride(3) == 1 else image.contiguous()
    b, c, height, width = image.shape
    d, k = weight.shape[0], weight.shape[-1]
    down, across = (_size(n, k, stride, padding) for n in (height, width))
    y = torch.empty((b, down, across, d), dtype=image.dtype, device=image.device)
    if y.numel():
        form = _form(c, k, stride, padding, d, image.dtype == torch.float32)
        sizes = (b * down * across, height, width, down, across)
        tensors = (image, weight.flatten(1).t().contiguous(), bias, norm_weight, norm_bias, y)
        form(ceil(sizes[0], form.constants["BT"]), tensors, image.stride()[:3], sizes, (eps,))
    return y


def _fake(
    image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, padding: int, eps: float
) -> Tensor:  # fmt: skip
    down, across = (_size(n, weight.shape[-1], stride, padding) for n in image.shape[2:])
    return image.new_empty((image.shape[0], down, across, weight.shape[0]))


_operator = Operator("patch_conv", _run, _fake)
