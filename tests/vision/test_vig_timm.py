"""What timm asks of every model in its registry, asked of ViG; TorchScript is refused."""

import math

import pytest
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import foveal.vision  # noqa: F401  (registers the models)

EVERY = sorted(timm.list_models("vig_*"))
SMALL = {
    "vig_tiny_patch16_224": {"depth": 4, "embed_dim": 48, "num_heads": 3},
    "vig_h_tiny": {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (3, 3, 6, 6)},
}
NAMES = list(SMALL)


def make(name: str, **extra) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL[name] | extra)).eval()


def image(size: int = 96, batch: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_all_six_are_registered():
    plain = [f"vig_{size}_patch16_224" for size in ("base", "small", "tiny")]
    assert sorted([*plain, "vig_h_base", "vig_h_small", "vig_h_tiny"]) == EVERY


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing_in_the_forward(name):
    model, x = make(name), image()
    plain = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
    assert plain.isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name, checkpointing):
    model = make(name, num_classes=42, drop_path_rate=0.0).train()
    model.set_grad_checkpointing(checkpointing)
    model(image(64, batch=2)).mean().backward()
    for parameter, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter


def test_checkpointing_changes_nothing_in_the_gradients():
    grads = []
    for on in (False, True):
        model = make("vig_tiny_patch16_224").train()
        model.set_grad_checkpointing(on)
        model(image(64)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration_describes_the_model(name):
    model, x = make(name), image(224)
    config, state = model.default_cfg, model.state_dict()
    features = model.forward_features(x)
    if features.ndim == 4:
        assert features.shape[-2:] == config["pool_size"]
    assert features.shape[1 if features.ndim == 4 else -1] == model.num_features
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (1, model.head_hidden_size)
    assert f"{config['classifier']}.weight" in state and f"{config['first_conv']}.weight" in state
    assert model.get_classifier().out_features == model.num_classes == 1000
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), hidden)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    torch.testing.assert_close(make(name, num_classes=0, global_pool="")(x).shape, features.shape)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (1, 7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "classes"), [(1, 5), (3, 0)], ids=["grey, five classes", "no classes"])
def test_weights_adapt_to_other_channels_and_classes(name, channels, classes):
    state = make(name).state_dict()
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": state},
        in_chans=channels,
        num_classes=classes,
        **SMALL[name],
    ).eval()
    assert model(image(channels=channels)).shape[-1] == (classes or model.num_features)
    norm = next(n for n in state if n.startswith("norm"))
    assert torch.equal(model.state_dict()[norm], state[norm])


@pytest.mark.parametrize("name", NAMES)
def test_torchscript_is_refused_in_a_sentence(name):
    with pytest.raises(RuntimeError, match=r"cannot be turned into TorchScript.*use torch\.compile"):
        torch.jit.script(make(name))


@pytest.mark.parametrize("name", NAMES)
def test_features_only_gives_the_maps_it_declares(name):
    model = timm.create_model(name, features_only=True, **SMALL[name]).eval()
    maps = model(image())
    assert len(maps) >= 3 and len(maps) == len(model.feature_info.channels())
    for x, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert x.shape[1] == channels
        assert all(size <= math.ceil(96 / reduction) + 1 for size in x.shape[-2:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indices", [[1], [0, 2], 2], ids=str)
def test_some_levels_only(name, indices):
    wanted = {"out_indices": indices}
    model = timm.create_model(name, features_only=True, **wanted, **SMALL[name]).eval()
    assert len(model(image())) == (indices if isinstance(indices, int) else len(indices))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_intermediates_come_with_the_same_final_output(name, checkpointing):
    model, x = make(name), image()
    model.set_grad_checkpointing(checkpointing)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    for y, level in zip(maps, model.feature_info, strict=True):
        assert y.shape[1] == level["num_chs"] and y.shape[-1] == 96 // level["reduction"]
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[1])


@pytest.mark.parametrize("name", NAMES)
def test_pruning_keeps_what_it_leaves(name):
    model, x = make(name), image()
    kept = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1], prune_norm=True)
    again = model.forward_features(x)
    again = again.transpose(1, 2).unflatten(2, (6, 6)) if again.ndim == 3 else again
    torch.testing.assert_close(again, kept)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


def traced(model: nn.Module) -> nn.Module:
    options = {
        "leaf_modules": list(get_notrace_modules()),
        "autowrap_functions": list(get_notrace_functions()),
        "param_shapes_constant": True,
    }
    names, evals = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model, train_return_nodes=[names[-1]], eval_return_nodes=[evals[-1]], tracer_kwargs=options
    )


@pytest.mark.parametrize("name", NAMES)
def test_traced_model_is_bit_exact(name):
    model, x = make(name), image()
    graph = traced(model).eval()
    assert torch.equal(next(iter(graph(x).values())), model(x))
    assert torch.equal(next(iter(graph(image(64)).values())), model(image(64)))


@pytest.mark.parametrize("name", NAMES)
def test_traced_model_has_all_gradients(name):
    graph = traced(make(name).train()).train()
    next(iter(graph(image(64)).values())).mean().backward()
    assert all(p.grad is not None for p in graph.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_belongs_to_a_group(name):
    from timm.models import group_parameters

    model = make(name)
    groups = group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters())) and len(groups) > 4


def test_positions_have_no_weight_decay():
    assert make("vig_tiny_patch16_224").no_weight_decay() == {"pos_embed"}
