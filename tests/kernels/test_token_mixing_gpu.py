"""The operators around attention on a GPU: outputs and gradients against PyTorch in fp64, at ViG's shapes and at odd ones."""

import pytest
import torch
from torch import Tensor

from foveal.kernels.token_mixing import (
    add_rms_norm,
    depthwise_conv,
    gated_mlp,
    log_gates,
    mix_branches,
    patch_conv,
    rms_norm,
    swiglu,
    takes_gated_mlp,
    takes_patch_conv,
)

pytestmark = pytest.mark.gpu

BOUND = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=["bf16", "fp16", "fp32"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    maker = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=maker, dtype=torch.float64, device="cuda")


def laws(call, leaves: list[Tensor], dtype: torch.dtype) -> None:
    results = []
    for kind, implementation in ((dtype, "triton"), (torch.float64, "torch")):
        own = [x.to(dtype).to(kind).requires_grad_() for x in leaves]
        outs = call(implementation, *own)
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = sum((o.double() * draw(*o.shape, seed=9)).sum() for o in outs)
        results.append([*outs, *torch.autograd.grad(loss, own)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        error = (got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-300)
        assert error < BOUND[dtype], f"result {i}: {error:.2e}"


@DTYPES
@pytest.mark.parametrize(
    ("size", "grid", "prefix", "width"), [(3, (14, 14), 0, 192), (5, (16, 24), 7, 96), (3, (9, 5), 1, 20)], ids=str
)
def test_depthwise_conv(dtype, size, grid, prefix, width):
    leaves = [draw(3, prefix + grid[0] * grid[1], width), draw(width, 1, size, size) / size, draw(width)]
    laws(lambda how, x, w, b: depthwise_conv(x[:, prefix:], grid, w, b, True, implementation=how), leaves, dtype)


@DTYPES
@pytest.mark.parametrize("width", [20, 192, 768])
def test_norms(dtype, width):
    leaves = [draw(3, 197, width), draw(3, 197, width, seed=1), draw(width)]
    laws(lambda how, x, y, w: add_rms_norm(x, y, w, implementation=how), leaves, dtype)
    laws(lambda how, x, w: rms_norm(x, w, implementation=how), [leaves[0], leaves[2]], dtype)


@DTYPES
@pytest.mark.parametrize(("heads", "values"), [(3, 64), (24, 32), (2, 20)], ids=str)
def test_mix_of_branches(dtype, heads, values):
    width = heads * values
    leaves = [
        draw(2, 196, width),
        draw(2, 196, heads, values),
        draw(2, 196, 2 * width),
        draw(values),
        draw(values, seed=1),
        draw(width),
    ]

    def call(how, local, seen, joint, wl, ws, bias):
        return mix_branches(
            local, seen.transpose(1, 2), joint[..., width:], wl, ws, bias=bias, silu=True, implementation=how
        )

    laws(call, leaves, dtype)


@DTYPES
def test_gates(dtype):
    joint = draw(2, 196, 592)
    laws(
        lambda how, x, w, b: log_gates(x[..., 576:], w, b, implementation=how), [joint, draw(192, 16), draw(192)], dtype
    )
    laws(lambda how, x: swiglu(x, implementation=how), [joint], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", [32, 96, 128, 192])
def test_the_whole_mlp(dtype, width):
    hidden = 32 * -(-(8 * width // 3) // 32)
    leaves = [
        draw(3, 197, width),
        draw(3, 197, width, seed=1),
        draw(width),
        draw(2 * hidden, width) / width**0.5,
        draw(width, hidden) / hidden**0.5,
    ]
    own = [x.to(dtype) for x in leaves]
    assert takes_gated_mlp(*own) and not takes_gated_mlp(*(x.requires_grad_() for x in [t.clone() for t in own]))
    want = gated_mlp(*(x.double() for x in own), implementation="torch")
    assert (gated_mlp(*own).double() - want).norm() / want.norm() < BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [(224, 224), (75, 61)], ids=["224x224", "odd"])
def test_the_stem(dtype, size):
    image, norm = draw(2, 3, *size).to(dtype), [draw(96).to(dtype), draw(96, seed=1).to(dtype)]
    weights = [(draw(96, 3, 9, 9) / 16).to(dtype), draw(96, seed=2).to(dtype), *norm]
    assert takes_patch_conv(image, *weights)
    want = patch_conv(image.double(), *(w.double() for w in weights), 8, 1, implementation="torch")
    got = patch_conv(image, *weights, 8, 1)
    assert (got.double() - want).norm() / want.norm() < BOUND[dtype]
    assert got.is_contiguous(memory_format=torch.channels_last)
