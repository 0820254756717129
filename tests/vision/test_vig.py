"""ViG: sizes, names, the mixer's laws, image sizes, and checkpoints."""

import pytest
import timm
import torch
from torch import nn

import foveal.vision  # noqa: F401  (registers the models)
from foveal.kernels.gated_linear.reference import recurrence
from foveal.vision.vig import grid_of
from foveal.vision.vig_mixer import BidirectionalMixer

COUNTS = {
    "vig_tiny_patch16_224": 5_834_536,
    "vig_small_patch16_224": 22_615_144,
    "vig_base_patch16_224": 89_022_184,
    "vig_h_tiny": 28_600_680,
    "vig_h_small": 50_051_688,
    "vig_h_base": 88_904_360,
}
SMALL = {
    "vig_tiny_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "vig_h_tiny": {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (3, 3, 6, 6)},
}


def small(name: str, **extra) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL[name] | extra)).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_those_of_the_paper(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_only_the_tiny_plain_model_has_both_activations():
    def acts(name: str) -> list[type]:
        mixer = next(m for m in timm.create_model(name, device="meta").modules() if isinstance(m, BidirectionalMixer))
        return [type(mixer.in_proj[1]), type(mixer.out_act)]

    assert acts("vig_tiny_patch16_224") == [nn.SiLU, nn.SiLU]
    assert all(acts(name) == [nn.Identity, nn.Identity] for name in list(COUNTS)[1:])


MIXER = {
    "in_proj.0.weight", "qkv_proj.weight", "gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias", "g_proj.weight", "g_proj.bias",
    "o_proj.weight", "g_norm.weight", "l_norm.weight",
}  # fmt: skip


def test_plain_names_are_those_of_released_checkpoints():
    names = set(small("vig_tiny_patch16_224", depth=1).state_dict())
    block = {"attn_norm.weight", "mlp_norm.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"} | {
        f"attn.{n}" for n in MIXER
    }
    stem = {f"patch_embed.proj.{i}.{w}" for i in (0, 1, 3, 4) for w in ("weight", "bias")}
    assert names == {"pos_embed", "norm.weight", "head.weight", "head.bias"} | stem | {f"blocks.0.{n}" for n in block}


def test_hierarchical_names_are_those_of_released_checkpoints_but_for_the_head():
    names = set(small("vig_h_tiny", depths=(1, 1, 1, 1)).state_dict())
    both = ("weight", "bias")
    block = (
        {f"{n}.{w}" for n in ("norm", "norm2") for w in both}
        | {f"op.{n}" for n in MIXER}
        | {"mlp.fc1.weight", "mlp.fc2.weight"}
    )
    want = {f"patch_embed.{i}.{w}" for i in (0, 2, 5, 7) for w in both} | {
        f"{n}.{w}" for n in ("norm", "head.fc") for w in both
    }
    want |= {f"layers.{s}.blocks.0.{n}" for s in range(4) for n in block}
    want |= {f"layers.{s}.downsample.{i}.{w}" for s in range(3) for i in (1, 3) for w in both}
    assert names == want


def mixer(**extra) -> BidirectionalMixer:
    torch.manual_seed(1)
    made = BidirectionalMixer(12, 3, dtype=torch.float64, **extra).eval()
    for p in made.parameters():  # every part must matter
        nn.init.normal_(p, std=0.5)
    return made


def slow_mixer(m: BidirectionalMixer, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The mixer written out: two recurrences, a mean, a mix."""
    b, n, d = x.shape
    local = m.in_proj(x.mT.reshape(b, d, height, width)).flatten(2).mT
    heads = lambda t: t.reshape(b, n, m.num_heads, -1).transpose(1, 2)  # noqa: E731
    q, k, v = m.qkv_proj(local).split([d // 2, d // 2, d], -1)
    gates = torch.nn.functional.logsigmoid(m.gk_proj(local)) / 16
    runs = [
        recurrence(heads(q), heads(k), heads(v), heads(g), (d // 2 // m.num_heads) ** -0.5, reverse=back)[0]
        for g, back in ((gates[..., : d // 2], False), (gates[..., d // 2 :], True))
    ]
    rms = lambda t, w: t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    seen = rms((runs[0] + runs[1]) / 2, m.g_norm.weight).transpose(1, 2).reshape(b, n, d)
    near = rms(local.reshape(b, n, m.num_heads, -1), m.l_norm.weight).reshape(b, n, d)
    mix = m.g_proj(local).sigmoid()
    return m.o_proj(m.out_act(mix * seen + (1 - mix) * near))


@pytest.mark.parametrize("acts", [False, True], ids=["plain", "activated"])
def test_mixer_equals_two_recurrences(acts):
    m = mixer(conv_act=acts, out_act=acts)
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    torch.testing.assert_close(m(x, 3, 5), slow_mixer(m, x, 3, 5), atol=1e-10, rtol=1e-10)


def test_turning_the_image_and_swapping_the_gates_turns_the_output():
    m, turned = mixer(), mixer()
    with torch.no_grad():
        turned.in_proj[0].weight.copy_(m.in_proj[0].weight.flip(2, 3))
        for p in turned.gk_proj[1].parameters():
            p.copy_(p.roll(6, 0))
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    torch.testing.assert_close(turned(x.flip(1), 3, 5), m(x, 3, 5).flip(1))


@pytest.mark.parametrize("open_", [True, False], ids=["attention only", "convolution only"])
def test_the_mix_chooses_a_branch(open_):
    m = mixer()
    nn.init.constant_(m.g_proj.bias, 1e4 if open_ else -1e4)
    x = torch.randn(1, 15, 12, dtype=torch.float64)
    before = m(x, 3, 5)
    nn.init.zeros_((m.l_norm if open_ else m.g_norm).weight)
    torch.testing.assert_close(m(x, 3, 5), before)
    nn.init.zeros_((m.g_norm if open_ else m.l_norm).weight)
    assert (m(x, 3, 5) == 0).all()


def test_training_and_evaluation_agree_unless_eval_half_is_asked_for():
    m = mixer()
    x = torch.randn(1, 15, 12, dtype=torch.float64) * 1e-2
    assert torch.equal(m.train()(x, 3, 5), m.eval()(x, 3, 5))
    half = mixer(eval_half=True)
    assert torch.equal(half.train()(x, 3, 5), m(x, 3, 5))
    quarter = half.eval()(x, 3, 5)
    half.g_norm.eps *= 4  # rms(o / 2, eps) = rms(o, 4 eps)
    torch.testing.assert_close(quarter, half.train()(x, 3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_log_gates_stay_fp32_under_autocast(dtype, monkeypatch):
    seen = []
    from foveal.vision import vig_mixer

    def spy(q, k, v, *gates, **kwargs):
        seen.extend([q.dtype, *(g.dtype for g in gates)])
        return v

    monkeypatch.setattr(vig_mixer, "bidirectional_gated_linear_attention", spy)
    with torch.autocast("cpu", dtype):
        mixer().float()(torch.randn(1, 15, 12), 3, 5)
    assert seen == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("name", SMALL)
def test_fused_kernels_give_the_model_that_pytorch_gives(name, monkeypatch):
    """Triton's kernels, in its interpreter, where PyTorch runs otherwise: the output and every gradient."""
    pytest.importorskip("triton")
    from foveal.kernels.token_mixing import dispatch

    model = small(name, **({"depth": 2} if "h" not in name.split("_") else {"depths": (1, 1), "num_heads": (3, 3)}))
    x, results = torch.randn(1, 3, 64, 48), []
    for fused in (False, True):
        monkeypatch.setattr(dispatch, "fused", lambda *_, fused=fused: fused)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(model.parameters()))])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-7


def test_a_layer_that_someone_listens_to_or_has_replaced_is_called():
    """Its weight alone would not say what it does: hooks are heard, and adapters count."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    m, x, heard = mixer(), torch.randn(1, 15, 12, dtype=torch.float64), []
    want = m(x, 3, 5)
    m.qkv_proj.register_forward_hook(lambda *_: heard.append("qkv"))
    m.in_proj[0].register_forward_hook(lambda *_: heard.append("conv"))
    torch.testing.assert_close(m(x, 3, 5), want)
    assert heard == ["conv", "qkv"]
    for at, layer in enumerate(m.gk_proj):
        other = Doubled(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
        other.load_state_dict(layer.state_dict())
        m.gk_proj[at] = other
    doubled = m(x, 3, 5)
    with torch.no_grad():
        m.gk_proj[0], m.gk_proj[1] = (_plain(layer) for layer in m.gk_proj)
        m.gk_proj[0].weight.mul_(2), m.gk_proj[1].weight.mul_(2), m.gk_proj[1].bias.mul_(2)
    torch.testing.assert_close(m(x, 3, 5), doubled)


def test_norms_that_someone_listens_to_are_called():
    model, x, heard = small("vig_tiny_patch16_224", depth=1), torch.randn(1, 3, 64, 64), []
    want = model(x)
    for name in ("attn_norm", "mlp_norm", "mlp"):
        model.blocks[0].get_submodule(name).register_forward_hook(lambda *_, name=name: heard.append(name))
    torch.testing.assert_close(model(x), want)
    assert heard == ["attn_norm", "mlp_norm", "mlp"]


def _plain(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
    made.load_state_dict(layer.state_dict())
    return made


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(96, 128), (75, 61)], ids=["96x128", "odd"])
def test_any_image_size(name, size):
    model = small(name)
    features = model.forward_features(torch.randn(1, 3, *size))
    if features.ndim == 3:
        height, width = grid_of(*size)
        assert features.shape == (1, height * width, model.num_features)
    assert model(torch.randn(2, 3, *size)).isfinite().all()


def test_another_input_size_stores_other_positions_and_the_own_size_leaves_them():
    model = small("vig_tiny_patch16_224", img_size=64)
    x = torch.randn(1, 3, 96, 64)
    before = model(x)
    model.set_input_size((96, 64))
    assert model.pos_embed.shape == (1, 24, 48)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("wrap", ["model", "model_ema", "bare", "module"])
def test_checkpoints_load_from_every_layout(wrap):
    source = small("vig_tiny_patch16_224", img_size=128, depth=1)
    state = source.state_dict()
    packed = {
        "model": {"model": state},
        "model_ema": {"model": {}, "model_ema": state, "optimizer": {}},
        "bare": dict(state),
        "module": {"model": {f"module.{n}": x for n, x in state.items()}},
    }[wrap]
    model = timm.create_model(
        "vig_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": packed},
        depth=1,
        embed_dim=48,
        num_heads=3,
    ).eval()
    assert model.pos_embed.shape[1] == 196
    x = torch.randn(1, 3, 128, 128)  # positions went from 8 x 8 to 14 x 14 and back
    rest = {n for n, p in source.named_parameters() if not torch.equal(p, model.get_parameter(n).detach())}
    assert rest == {"pos_embed"} and model(x).isfinite().all()


def test_old_hierarchical_checkpoints_load():
    source = small("vig_h_tiny", depths=(1, 1, 1, 1))
    old = {}
    for name, x in source.state_dict().items():
        name = name.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        name = name.replace(".norm.", ".ln_1.") if name.startswith("layers") and ".downsample" not in name else name
        name = name.replace(".op.", ".self_attention.").replace("head.fc.", "head.")
        old[name] = x[..., None, None] if name.endswith("qkv_proj.weight") else x
    old["outnorm0.weight"] = torch.ones(24)
    model = timm.create_model(
        "vig_h_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": {"model": old}},
        **(SMALL["vig_h_tiny"] | {"depths": (1, 1, 1, 1)}),
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))
    classifier = {n.replace("head.fc.", "classifier.head."): x for n, x in source.state_dict().items()}
    classifier |= {f"classifier.norm.{w}": classifier.pop(f"norm.{w}") for w in ("weight", "bias")}
    from foveal.vision.vig_checkpoint import checkpoint_filter_fn

    assert set(checkpoint_filter_fn(classifier, model)) == set(source.state_dict())


def test_positions_that_form_no_square_are_refused():
    from foveal.vision.vig_checkpoint import checkpoint_filter_fn

    with pytest.raises(ValueError, match=r"holds 10 positions, which form no square"):
        checkpoint_filter_fn({"pos_embed": torch.zeros(1, 10, 48)}, small("vig_tiny_patch16_224", depth=1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BidirectionalMixer(12, 4), r"width 12 is not divisible by twice the 4 heads"),
        (lambda: mixer()(torch.zeros(1, 14, 12, dtype=torch.float64), 3, 5), r"14 tokens do not form a grid of 3 by 5"),
        (lambda: small("vig_tiny_patch16_224", depth=1)(torch.zeros(1, 3, 6, 32)), r"at least 7 on each side"),
        (lambda: small("vig_tiny_patch16_224", num_classes=-1), r"num_classes is -1"),
        (lambda: small("vig_h_tiny", global_pool="median"), r"no global_pool 'median'"),
    ],
    ids=["width", "grid", "pixels", "classes", "pool"],
)
def test_errors_are_sentences(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("name", SMALL)
def test_compiled_model_equals_eager_model_in_one_graph(name):
    model = small(name, **({"depth": 1} if "h" not in name.split("_") else {"depths": (1,), "num_heads": (3,)}))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, model(x))


@pytest.mark.slow
def test_a_small_model_learns_what_a_linear_probe_cannot():
    """Are the squares in the two halves both bright or both dark? Every pixel's mean is the same for both answers."""
    torch.manual_seed(0)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, signs = torch.zeros(n, 1, 16, 32), torch.randint(2, (n, 2)) * 2 - 1
        for i in range(n):
            for half in range(2):
                y, x = int(torch.randint(0, 8, ())), 16 * half + int(torch.randint(0, 8, ()))
                images[i, 0, y : y + 8, x : x + 8] = signs[i, half]
        return images, (signs[:, 0] == signs[:, 1]).long()

    (x, y), (tx, ty) = draw(1024), draw(256)
    ones = lambda t: torch.cat((t.flatten(1), torch.ones(len(t), 1)), 1)  # noqa: E731
    probe = torch.linalg.lstsq(ones(x), nn.functional.one_hot(y, 2).float(), driver="gelsd").solution
    linear = ((ones(tx) @ probe).argmax(1) == ty).float().mean()
    model = timm.create_model(
        "vig_h_tiny", in_chans=1, num_classes=2, embed_dim=24, depths=(1, 1), num_heads=(2, 2)
    ).train()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    recent = [1.0] * 12
    for _ in range(300):
        pick = torch.randint(len(x), (32,))
        loss = nn.functional.cross_entropy(model(x[pick]), y[pick])
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        recent = [*recent[1:], float(loss.detach())]
        if max(recent) < 0.4:
            break
    with torch.no_grad():
        accuracy = (model.eval()(tx).argmax(1) == ty).float().mean()
    assert accuracy > linear + 0.2, f"model {accuracy:.2f}, linear probe {linear:.2f}"
