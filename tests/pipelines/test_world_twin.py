"""The plain-torch twin is the stock transformer."""

import pytest
import torch

from foveal.pipelines.world.flow import velocity
from foveal.pipelines.world.models import MODELS, build_transformer, count_parameters


def pair(name: str):
    config = MODELS[name].transformer
    torch.manual_seed(0)
    stock, twin = build_transformer(config, "stock").eval(), build_transformer(config, "twin").eval()
    twin.load_state_dict(stock.state_dict(), strict=True)
    return stock, twin


@pytest.mark.parametrize("per_token", [False, True], ids=["per-sample", "per-token"])
def test_twin_equals_stock(per_token):
    pytest.importorskip("diffusers")
    stock, twin = pair("world-nano")
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 16, 24, generator=rng)
    timestep = 1000 * torch.rand((2, 4 * 4 * 6) if per_token else (2,), generator=rng)
    encoding = torch.randn(2, 10, 64, generator=rng)
    with torch.no_grad():
        torch.testing.assert_close(
            velocity(twin, x, timestep, encoding), velocity(stock, x, timestep, encoding), atol=1e-5, rtol=0
        )


def test_gradients_agree():
    pytest.importorskip("diffusers")
    stock, twin = pair("tiny")
    x, encoding = torch.randn(2, 3, 4, 16, 16), torch.randn(2, 10, 64)
    for model in (stock, twin):
        velocity(model, x, torch.tensor([300.0, 900.0]), encoding).pow(2).mean().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "params"), [("world-nano", 1_580_720), ("world-video", 4_345_840)])
def test_sizes_are_as_documented(name, params):
    assert count_parameters(build_transformer(MODELS[name].transformer, "twin")) == params


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="use 'auto', 'stock' or 'twin'"):
        build_transformer(MODELS["tiny"].transformer, "fast")


def test_too_large_a_grid_is_refused():
    twin = build_transformer({**MODELS["tiny"].transformer, "rope_max_seq_len": 2}, "twin")
    with pytest.raises(ValueError, match="exceeds rope_max_seq_len"):
        velocity(twin, torch.zeros(1, 3, 4, 16, 16), torch.zeros(1), torch.zeros(1, 10, 64))
