"""The operators around attention on a GPU: outputs and gradients against PyTorch in fp64, at ViG's shapes and at odd ones."""

import pytest
import torch
from torch import Tensor

from foveal.kernels.token_mixing import (
    add_rms_norm,
    depthwise_conv,
    log_gates,
    mix_branches,
    patch_conv,
    reference,
    rms_norm,
    swiglu,
    takes_patch_conv,
)
from foveal.kernels.token_mixing.block import gated_block, takes_gated_block
from foveal.kernels.token_mixing.block_parts import BlockSettings, BlockWeights, shapes

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
@pytest.mark.parametrize("size", [(224, 224), (75, 61)], ids=["224x224", "odd"])
def test_the_stem(dtype, size):
    image, norm = draw(2, 3, *size).to(dtype), [draw(96).to(dtype), draw(96, seed=1).to(dtype)]
    weights = [(draw(96, 3, 9, 9) / 16).to(dtype), draw(96, seed=2).to(dtype), *norm]
    assert takes_patch_conv(image, *weights)
    want = patch_conv(image.double(), *(w.double() for w in weights), 8, 1, implementation="torch")
    got = patch_conv(image, *weights, 8, 1)
    assert (got.double() - want).norm() / want.norm() < BOUND[dtype]
    assert got.is_contiguous(memory_format=torch.channels_last)


BLOCKS = pytest.mark.parametrize(
    ("width", "heads"), [(32, 2), (96, 3), (128, 2), (192, 3), (384, 6)], ids=["32", "96", "128", "192", "384"]
)


def block_of(width: int, heads: int, height: int, across: int) -> tuple[Tensor, BlockWeights, BlockSettings]:
    sizes = shapes(width, heads, 16, 8 * width // 3)
    weights = [
        1 + 0.3 * draw(*s, seed=i) if len(s) == 1 else draw(*s, seed=i) / s[1:].numel() ** 0.5
        for i, s in enumerate(map(torch.Size, sizes))
    ]
    settings = BlockSettings(height, across, heads, 0.1, 16.0, 1e-6, 1e-6, 1e-5, 1e-6, True, True)
    return draw(3, height * across, width), BlockWeights(*weights), settings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@BLOCKS
def test_the_whole_block(dtype, width, heads):
    x, weights, settings = block_of(width, heads, 9, 23)
    x, weights = x.to(dtype), BlockWeights(*(w.to(dtype) for w in weights))
    assert takes_gated_block(x, weights, heads)
    want = reference.gated_block(x.double(), BlockWeights(*(w.double() for w in weights)), settings)
    for _ in range(2):  # compiled, then kept
        got = gated_block(x, weights, settings)
        assert (got.double() - want).norm() / want.norm() < 2 * BOUND[dtype]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@BLOCKS
def test_the_whole_block_with_gradients(autocast, width, heads):
    x, weights, settings = block_of(width, heads, 9, 23)
    results = []
    for kind in (torch.float32, torch.float64):
        own = [t.to(kind).requires_grad_() for t in (x, *weights)]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast and kind == torch.float32):
            whole = takes_gated_block(own[0], BlockWeights(*own[1:]), heads)
            call = gated_block if whole else reference.gated_block
            y = call(own[0], BlockWeights(*own[1:]), settings)
        assert whole == (kind == torch.float32)
        results.append([y, *torch.autograd.grad((y.double() * draw(*y.shape, seed=9)).sum(), own)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        error = (got.detach().double() - want.detach()).norm() / want.detach().norm()
        assert error < (3e-2 if autocast else 2e-3), f"result {i}: {error:.2e}"
