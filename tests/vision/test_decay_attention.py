"""Decay attention against its definition, its limits, its layers in timm's ViTs, and its refusals."""

import pytest
import timm
import torch
import torch.nn.functional as F

from foveal.plugins.order import axis_tiles
from foveal.vision.decay_attention import (
    DecayAttention,
    SwinDecayAttention,
    alternate_shifts,
    decay_attention,
    decay_rates,
    rotate,
    segments,
)  # fmt: skip
from foveal.vision.token_layer import bind_grid

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
RATES = torch.tensor([-0.3, -0.05], dtype=torch.float64)


def qkv(grid, prefix=0, heads=2, d=4, batch=2):
    make = torch.Generator().manual_seed(0)
    shape = (batch, heads, prefix + grid[0] * grid[1], d)
    return [torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(3)]


def segment_of(length, window, shift):
    return [0 if window is None else (i + shift) // window for i in range(length)]


def definition(q, k, v, rates, grid, *, form="decomposed", window=None, shift=0, prefix=0):
    """Query by query and key by key, in the words of the paper."""
    height, width = grid
    heads, d = q.shape[1], q.shape[3]
    place = [(y, x) for y in range(height) for x in range(width)]
    part = [segment_of(n, window, shift) for n in grid]

    def one(query, head, seen, values):
        """seen: [(token, steps away)] -> [B, d]"""
        scores = [(q[:, head, query] * k[:, head, t]).sum(-1) * d**-0.5 + rates[head] * steps for t, steps in seen]
        weights = torch.stack(scores, -1)
        weights = weights if form == "linear" else weights.softmax(-1)
        return sum(weights[:, i, None] * values[:, head, t] for i, (t, _) in enumerate(seen))

    def linear(query, head, seen, values):
        return sum(
            torch.exp(rates[head] * steps) * (q[:, head, query] * k[:, head, t]).sum(-1, keepdim=True) * d**-0.5 * values[:, head, t]
            for t, steps in seen
        )  # fmt: skip

    mix = linear if form == "linear" else one
    lead = [(t, 0) for t in range(prefix)]
    every = [(t, 0) for t in range(q.shape[2])]

    def run(values, steps):
        outs = [[mix(t, h, every, values) for t in range(prefix)] for h in range(heads)]
        for h in range(heads):
            for i, a in enumerate(place):
                near = [(prefix + j, steps(a, b)) for j, b in enumerate(place) if steps(a, b) is not None]
                outs[h].append(mix(prefix + i, h, lead + near, values))
        return torch.stack([torch.stack(o, 1) for o in outs], 1)

    if form == "full":
        return run(v, lambda a, b: abs(a[0] - b[0]) + abs(a[1] - b[1]))
    same = lambda axis, a, b: a[1 - axis] == b[1 - axis] and part[axis][a[axis]] == part[axis][b[axis]]  # noqa: E731
    pass_along = lambda axis: lambda a, b: abs(a[axis] - b[axis]) if same(axis, a, b) else None  # noqa: E731
    first = run(v, pass_along(1))
    first = torch.cat((v[:, :, :prefix], first[:, :, prefix:]), 2)  # prefix tokens keep their values between the passes
    second = run(first, pass_along(0))
    dense = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    return torch.cat((dense, second[:, :, prefix:]), 2)


CASES = {
    "full": ((3, 4), {"form": "full"}), "full, five prefix tokens": ((2, 3), {"form": "full", "prefix": 5}),
    "decomposed": ((3, 4), {}), "decomposed, one prefix token": ((3, 2), {"prefix": 1}), "one row": ((1, 5), {}),
    "windows": ((4, 6), {"window": 2}), "ragged windows": ((5, 4), {"window": 3}), "shifted windows": ((5, 7), {"window": 3, "shift": 1}),
    "shifted, prefix": ((4, 3), {"window": 3, "shift": 2, "prefix": 1}), "window beyond the grid": ((3, 4), {"window": 9, "shift": 4}),
    "linear": ((3, 4), {"form": "linear"}), "linear in windows": ((4, 5), {"form": "linear", "window": 3, "shift": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("grid", "options"), CASES.values(), ids=CASES)
def test_equals_the_definition_and_so_do_the_gradients(grid, options):
    outs, grads = [], []
    for function in (decay_attention, definition):
        inputs = [x.requires_grad_() for x in qkv(grid, options.get("prefix", 0))]
        out = function(*inputs, RATES, grid, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads.append(torch.autograd.grad((out * weight).sum(), inputs))
        outs.append(out)
    torch.testing.assert_close(*outs, **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_without_decay_the_full_form_is_dense_attention(prefix):
    q, k, v = qkv((5, 4), prefix)
    out = decay_attention(q, k, v, torch.zeros(2), (5, 4), form="full", prefix=prefix)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **CLOSE)


def test_pieces_of_the_bias_change_nothing(monkeypatch):
    q, k, v = qkv((6, 5), 1)
    whole = decay_attention(q, k, v, RATES, (6, 5), form="full", prefix=1)
    monkeypatch.setattr("foveal.vision.decay_attention.BIAS_ELEMENTS", 2 * 5 * 30 * 4)
    torch.testing.assert_close(decay_attention(q, k, v, RATES, (6, 5), form="full", prefix=1), whole, **CLOSE)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 20])
def test_segments_are_the_tiles_of_the_axis(window):
    for length in (1, 3, 7, 12):
        for shift in range(0 if window is None else window):
            tiles = axis_tiles(length, window, shift=shift)
            runs = segments(length, window, shift)
            starts = [start + i * size for start, size, count in runs for i in range(count)]
            assert starts == tiles.start.tolist()
            assert sum(size * count for _, size, count in runs) == length and len(runs) <= 3


def test_rates_are_those_of_the_paper():
    want = [1 - 2 ** (-2 - 6 * i / 4) for i in range(4)]
    torch.testing.assert_close(decay_rates(4, 6.0).exp(), torch.tensor(want))


def test_positions_turn_pairs_by_the_raster_index():
    x = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)))
    turn = torch.exp(1j * torch.arange(6)[:, None] * torch.tensor([1.0, 1e-4], dtype=torch.float64))
    torch.testing.assert_close(rotate(x), torch.view_as_real(pairs * turn).flatten(-2), **CLOSE)


def test_the_layer_adds_the_convolution_then_gates():
    torch.manual_seed(0)
    layer = DecayAttention(16, 2, gate=True, form="full").double().eval()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4)
    seen = definition(rotate(q), rotate(k), v, decay_rates(2).double(), (3, 4), form="full").transpose(1, 2).flatten(2)
    values = v.transpose(1, 2).flatten(2)
    near = F.conv2d(values.mT.reshape(2, 16, 3, 4), layer.lepe.weight, layer.lepe.bias, padding=2, groups=16)
    want = layer.proj((seen + near.flatten(2).mT) * layer.gate(x).sigmoid())
    torch.testing.assert_close(layer(x, grid=(3, 4)), want, **CLOSE)


LAYERS = {
    "decomposed": DecayAttention, "full": DecayAttention.with_options(form="full", heads_range=6.0), "swin": SwinDecayAttention,
    "linear": DecayAttention.with_options(form="linear"),
}  # fmt: skip


def vit(layer, **options):
    torch.manual_seed(0)
    sizes = {"depth": 3, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **sizes, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_trains_in_a_vit_on_pictures_of_any_shape(kind):
    options = {"class_token": False, "global_pool": "avg"} if kind == "linear" else {"reg_tokens": 4}
    model = bind_grid(alternate_shifts(vit(LAYERS[kind], **options)))
    for size in ((96, 160), (64, 64)):
        model.zero_grad()
        model(torch.randn(2, 3, *size)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_names_reach_timm_and_plain_weights_load():
    model, plain = vit("foveal.swin_decay"), vit("attn")
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[3] for name in missing} == {"lepe", "gate"}
    assert isinstance(vit("foveal.decay").blocks[0].attn, DecayAttention)
    twin = vit("foveal.swin_decay")
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(bind_grid(twin.eval())(x), bind_grid(model.eval())(x), rtol=0, atol=0)


def test_every_other_layer_is_shifted():
    assert [b.attn.shift for b in alternate_shifts(vit(SwinDecayAttention)).blocks] == [0, 3, 0]


def test_bfloat16_is_close():
    layer = DecayAttention(32, 2).eval()
    x = torch.randn(2, 24, 32)
    half = DecayAttention(32, 2, dtype=torch.bfloat16).eval()
    half.load_state_dict(layer.state_dict())
    torch.testing.assert_close(half(x.bfloat16(), grid=(4, 6)).float(), layer(x, grid=(4, 6)), rtol=5e-2, atol=5e-2)


def test_dropout_acts_in_training_only():
    layer = DecayAttention(16, 2, attn_drop=0.5)
    x = torch.randn(1, 16, 16)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecayAttention(30, 4), "30 is not divisible by 4 heads"),
        (lambda: DecayAttention(12, 4), "head dimension is 3; rotary"),
        (lambda: DecayAttention(16, 2, form="cubic"), "no form 'cubic'; choose one of decomposed, full, linear"),
        (lambda: DecayAttention(16, 2, form="full", window=3), "windows cut the one-dimensional passes"),
        (lambda: DecayAttention(16, 2, window=3, shift=3), "shift is 3; with window 3"),
        (lambda: DecayAttention(16, 2, window=0), "window is 0"),
        (lambda: SwinDecayAttention(16, 2, variant="swat"), "not published in enough detail"),
        (lambda: SwinDecayAttention(16, 2, variant="swot"), "no variant 'swot'"),
        (lambda: decay_attention(*qkv((3, 4)), RATES, (3, 5)), "12 tokens do not form a grid of 3 by 5"),
        (lambda: decay_attention(*qkv((3, 4)), RATES[:1], (3, 4)), "one number for each of the 2 heads"),
        (lambda: decay_attention(*qkv((3, 4), 1), RATES, (3, 4), form="linear", prefix=1), "neither prefix tokens nor dropout"),
    ],
    ids=["heads", "odd", "form", "full window", "shift", "window", "swat", "variant", "grid", "rates", "linear prefix"],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_masks_and_torchscript_are_refused():
    layer, x = DecayAttention(16, 2), torch.randn(1, 16, 16)
    with pytest.raises(NotImplementedError, match="DecayAttention takes no attention mask"):
        layer(x, attn_mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="takes no causal order"):
        layer(x, is_causal=True)
    with pytest.raises(RuntimeError, match="cannot be turned into TorchScript"):
        torch.jit.script(layer)
