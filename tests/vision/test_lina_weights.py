"""Laws of LINA's weights: released names, layouts and gates; another grid."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from random_lina import draw, tiny

from foveal.vision.lina import LinaModel
from foveal.vision.lina_checkpoint import load_weights, released_name, released_weights
from foveal.vision.lina_config import preset


def test_released_names_go_there_and_back():
    model = tiny(video=True, kv_gate="raw")
    weights = released_weights(model)
    assert weights["image_encoder.patch_embed.proj.weight"].shape == (32, 1, 2, 2)
    other = tiny(1, video=True, kv_gate="raw")
    load_weights(other, {f"module.{name}": value for name, value in weights.items()})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_released_names_are_those_of_the_files():
    config = preset("lina_small_256")
    names = {released_name(name, config) for name in LinaModel(config, device="meta").state_dict()}
    block = {f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")} | {
        f"{layer}.{kind}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")
    }
    local = {"attn.dw_conv.weight", "attn.dw_conv.bias", "attn.key_scale", "attn.value_scale"}
    both = ("weight", "bias")
    expected = {f"video_encoder.blocks.{i}.{x}" for i in range(16) for x in block}
    expected |= {f"image_encoder.blocks.{i}.{x}" for i in range(32) for x in block | (local if i >= 16 else set())}
    expected |= {
        f"{part}_encoder.{x}.{k}" for part in ("video", "image") for x in ("patch_embed.proj", "norm") for k in both
    }
    inner = ("norm1.proj", "proj.fc1", "proj.fc2", "norm2")
    expected |= {f"image_decoder.blocks.{i}.{x}.{k}" for i in range(6) for x in inner for k in both}
    times = [f"time_cond_embed.{kind}_proj.{x}" for kind in ("timestep", "condition") for x in ("fc1", "fc2")]
    expected |= {f"image_decoder.{x}.{k}" for x in ("patch_embed.proj", "norm.proj", "head", *times) for k in both}
    expected |= {"mask_embed.bos_token", "mask_embed.mask_token", "label_embed.weight"}
    expected |= {f"{x}.{k}" for x in ("label_embed.norm", "video_pos_embed.norm", "video_pos_embed.time_proj.0", "video_pos_embed.time_proj.2") for k in both}  # fmt: skip
    assert names == expected


def test_released_gates_and_layouts_fit_our_models():
    raw = tiny(kv_gate="raw")
    weights, ours = released_weights(raw), tiny(1, kv_gate="exp")
    for name in [n for n in weights if n.endswith(("attn.qkv.weight", "attn.qkv.bias"))]:
        q, kv = weights.pop(name).split([32, 64])
        weights |= {name.replace("qkv", "q"): q, name.replace("qkv", "kv"): kv}
    load_weights(ours, dict(weights))
    torch.testing.assert_close(draw(ours, [0], [0]), draw(raw, [0], [0]), rtol=0, atol=1e-6)
    key = "image_encoder.blocks.1.attn.key_scale"
    weights[key] = weights[key] - 2
    with pytest.raises(ValueError, match="kv_gate='raw'"):
        load_weights(ours, dict(weights))
    with pytest.warns(UserWarning, match=r"decoder\.0\.attn has key gates down to"):
        load_weights(raw, dict(weights))


def test_another_grid_needs_resized_gates():
    model = tiny()
    large = LinaModel(model.config.resized(8)).double()
    with pytest.raises(ValueError, match="resize_gates=True"):
        load_weights(large, model.state_dict())
    load_weights(large, model.state_dict(), resize_gates=True)
    with pytest.raises(ValueError, match="made for 20 tokens"):
        model.decoder[0](torch.randn(1, 80, 32).double())
    model.resize_gates_(8)
    assert model.config.side == 16 and torch.equal(draw(model, [0], [0]), draw(large, [0], [0]))
    with pytest.raises(ValueError, match=r"missing: connector\.query"):
        load_weights(model, {k: v for k, v in model.state_dict().items() if k != "connector.query"})
    with pytest.raises(ValueError, match="choose the preset"):
        load_weights(model, LinaModel(preset("lina_nano_digits")).state_dict())
