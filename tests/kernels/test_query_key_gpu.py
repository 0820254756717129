"""Norm and rotation of queries and keys on a GPU: the sizes of models, rounded as plain PyTorch rounds."""

import pytest
import torch

from foveal.kernels.query_key import Norm, Rotation, norm_and_rotate, refusal

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")
MODELS = {  # tokens, heads, norm across heads, rounded twice, shared tables
    "wan-1.3b": (32760, 12, True, False, True),
    "wan-14b": (5000, 40, True, False, True),
    "flux": (16896, 24, False, False, False),
    "hunyuan": (29767, 24, False, True, False),
}


def draw(n, heads, across, twice, shared, dtype):
    torch.manual_seed(0)
    q, k, _ = (
        x.unflatten(2, (heads, 128)) for x in torch.randn(1, n, 3 * heads * 128, device=CARD, dtype=dtype).chunk(3, -1)
    )
    width = heads * 128 if across else 128
    norms = tuple(Norm((1 + torch.randn(width, device=CARD) / 3).to(dtype), 1e-6, across, twice) for _ in range(2))
    angles = (6.28 * torch.rand(n, 64, device=CARD)).repeat_interleave(2, dim=1)
    return q, k, norms, Rotation(angles.cos(), angles.sin(), shared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_rounds_as_plain_pytorch_does(name, dtype):
    call = draw(*MODELS[name], dtype)
    assert refusal(*call) is None
    order = torch.randperm(call[0].shape[1], device=CARD)
    for o in (None, order):
        got = norm_and_rotate(*call, order=o)
        want = norm_and_rotate(*call, order=o, implementation="torch")
        for a, b in zip(got, want, strict=True):
            assert float((a.double() - b.double()).norm() / b.double().norm()) < 4e-3
            assert dtype == torch.float32 or float((a != b).float().mean()) < 1e-3
