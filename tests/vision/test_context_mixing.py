"""ContMix: kernels over neighbourhoods against loops, the mixer against its formulas, its layer in timm's ViTs, and its refusals."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import foveal.vision.neighborhood_mixing as operator
from foveal.plugins.windows import neighborhood_table
from foveal.vision.context_mixing import ContextMixing, ContextMixingTokens, relative_bias
from foveal.vision.neighborhood_mixing import neighborhood_mix, window_starts
from foveal.vision.token_layer import bind_grid

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def kernels_and_values(height, width, size, batch=2, heads=2, channels=3, dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    shape = (batch, heads, height, width)
    w = torch.randn(*shape, size * size, generator=make, dtype=dtype)
    return w, torch.randn(*shape, channels, generator=make, dtype=dtype)


def by_loops(w, v):
    height, width, size = *v.shape[2:4], int(w.shape[-1] ** 0.5)
    rows, columns = (neighborhood_table(n, size).low for n in (height, width))
    out = []
    for y in range(height):
        for x in range(width):
            seen = v[:, :, rows[y] : rows[y] + size, columns[x] : columns[x] + size].flatten(2, 3)
            out.append((w[:, :, y, x, :, None] * seen).sum(2))
    return torch.stack(out, 2).unflatten(2, (height, width))


SIZES = {
    "3 on 5x7": (5, 7, 3), "5 on 5x9, as tall as the map": (5, 9, 5), "one place": (4, 3, 1), "even": (6, 5, 4), "whole map": (3, 3, 3),
    "7 on 9x45, two stretches": (9, 45, 7),
}  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_loops_and_so_do_the_gradients(sizes):
    outs, grads = [], []
    for function in (neighborhood_mix, by_loops):
        inputs = [t.requires_grad_() for t in kernels_and_values(*sizes)]
        out = function(*inputs)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads.append(torch.autograd.grad((out * weight).sum(), inputs))
        outs.append(out)
    torch.testing.assert_close(*outs, **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_derivatives_are_those_of_differences():
    inputs = [t.requires_grad_() for t in kernels_and_values(4, 5, 3, batch=1, heads=1, channels=2)]
    assert torch.autograd.gradcheck(neighborhood_mix, inputs)


@pytest.mark.parametrize("columns", [1, 4, 8])
def test_stretches_change_nothing(columns, monkeypatch):
    w, v = kernels_and_values(7, 19, 5)
    monkeypatch.setattr(operator, "COLUMNS", columns)
    torch.testing.assert_close(neighborhood_mix(w, v), by_loops(w, v), **CLOSE)


def test_windows_start_where_the_neighbourhood_rule_says():
    for length in range(1, 12):
        for size in range(1, length + 1):
            assert window_starts(length, size).tolist() == neighborhood_table(length, size).low.tolist()


def test_a_window_of_the_whole_map_is_a_dense_product():
    w, v = kernels_and_values(5, 5, 5)
    want = w.flatten(2, 3) @ v.flatten(2, 3)
    torch.testing.assert_close(neighborhood_mix(w, v).flatten(2, 3), want, **CLOSE)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_nothing_of_the_size_of_all_windows_is_made_or_kept():
    w, v = kernels_and_values(24, 40, 9, channels=16, dtype=torch.float32)
    unfolded = v.numel() * 81
    with Largest() as made:
        operator._mix._init_fn(w, v)
        operator._mix_backward._init_fn(v, w, v)
    assert made.elements <= max(w.numel(), 4 * v.numel()) < unfolded / 10
    out = neighborhood_mix(w.requires_grad_(), v.requires_grad_())
    assert [t.data_ptr() for t in out.grad_fn.saved_tensors] == [w.data_ptr(), v.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_close(dtype):
    w, v = kernels_and_values(9, 8, 5, dtype=torch.float32)
    w = w.softmax(-1)
    out = neighborhood_mix(w.to(dtype), v.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), by_loops(w, v), rtol=5e-2, atol=3e-2)


def test_autocast_changes_nothing_inside():
    w, v = kernels_and_values(6, 6, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(neighborhood_mix(w, v), operator._mix(w, v))
    torch.testing.assert_close(operator._mix(w, v), by_loops(w, v))


def test_position_tables_are_read_by_offset():
    table = torch.arange(2 * 5 * 5, dtype=torch.float64).view(2, 5, 5)
    bias = relative_bias(table, 4, 6)
    low = [neighborhood_table(n, 3).low for n in (4, 6)]
    for y, x, a, b in ((0, 0, 0, 0), (3, 5, 2, 1), (1, 3, 0, 2), (0, 5, 2, 2)):
        want = table[:, low[0][y] + a - y + 2, low[1][x] + b - x + 2]
        assert torch.equal(bias[:, y, x, 3 * a + b], want)


def mixer(**options):
    torch.manual_seed(0)
    layer = ContextMixing(16, 2, **({"kernel_size": 5, "smk_size": 3} | options)).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def formulas(layer, x, context):
    """The mixer place by place and head by head, up to its last projection."""
    heads, batch, places = layer.heads, x.shape[0], x.shape[2] * x.shape[3]
    query = layer.weight_query(x).reshape(batch, heads, -1, places)
    key = layer.weight_key(F.adaptive_avg_pool2d(context, 7)).reshape(batch, heads, -1, 49)
    affinity = torch.einsum("bgcn,bgcl->bgnl", query, key) * (16 / heads) ** -0.5
    logits = affinity @ layer.weight_proj.weight.T + layer.weight_proj.bias
    logits = logits.unflatten(2, x.shape[2:])
    outs = []
    for part, size, table, at in ((0, 3, layer.rpb1, 0), (1, 5, layer.rpb2, 9)):
        weights = (logits[..., at : at + size * size] + relative_bias(table, *x.shape[2:])).softmax(-1)
        values = x.chunk(2, 1)[part].unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2)
        outs.append(by_loops(weights, values).permute(0, 1, 4, 2, 3).flatten(1, 2))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("context", [None, (6, 4, 3)], ids=["its own map", "a context"])
def test_the_mixer_follows_its_formulas(context):
    layer = mixer(context_dim=context and context[0])
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64)
    given = None if context is None else torch.randn(2, *context, dtype=torch.float64)
    want = layer.dyconv_proj(formulas(layer, x, x if given is None else given))
    torch.testing.assert_close(layer(x, given), want, **CLOSE)


@pytest.mark.parametrize(("size", "enlarged"), [((3, 4), (5, 6)), ((4, 2), (10, 5)), ((1, 1), (5, 5))], ids=str)
def test_a_small_map_is_enlarged_and_pooled_back(size, enlarged):
    layer, x = mixer(), torch.randn(1, 16, *size, dtype=torch.float64)
    assert layer.enlarged(*size) == enlarged
    wide = F.interpolate(x, enlarged, mode="bilinear")
    want = layer.dyconv_proj(F.adaptive_avg_pool2d(formulas(layer, wide, wide), size))
    torch.testing.assert_close(layer(x), want, **CLOSE)


def vit(layer="foveal.contmix", **options):
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **sizes, **options)


@pytest.mark.parametrize(("prefix", "options"), [
    (0, {"class_token": False, "global_pool": "avg"}), (1, {}), (5, {"reg_tokens": 4}),
], ids=["no prefix", "class token", "registers"])  # fmt: skip
def test_trains_in_a_vit_on_pictures_of_any_shape(prefix, options):
    model = bind_grid(vit(**options))
    for size in ((128, 160), (48, 80)):
        model.zero_grad()
        model(torch.randn(2, 3, *size)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].attn.where.prefix == prefix


def test_prefix_tokens_read_the_map_and_leave_it_alone():
    layer = ContextMixingTokens(16, 2, kernel_size=3, smk_size=3, num_prefix_tokens=1).eval()
    x = torch.randn(1, 13, 16)
    other = x.clone()
    other[:, 0] += 1
    torch.testing.assert_close(layer(other, grid=(3, 4))[:, 1:], layer(x, grid=(3, 4))[:, 1:], rtol=0, atol=1e-6)
    other = x.clone()
    other[:, 5] += 1
    assert (layer(other, grid=(3, 4)) - layer(x, grid=(3, 4)))[:, 0].abs().max() > 1e-4
    plain = ContextMixingTokens(16, 2, kernel_size=3, smk_size=3).eval()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(x[:, 1:], grid=(3, 4)), layer(x, grid=(3, 4))[:, 1:])


def test_state_dict_round_trip_and_whole_graph():
    one, two = (ContextMixingTokens(16, 2, kernel_size=3, smk_size=3).eval() for _ in range(2))
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 25, 16)
    assert torch.equal(one(x), two(x))
    torch.testing.assert_close(torch.compile(one, backend="eager", fullgraph=True)(x), one(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextMixing(20, 2), "20 is not divisible by 4 times 2 heads"),
        (lambda: ContextMixing(16, 2, kernel_size=6), "kernel_size is 6; it is odd"),
        (lambda: ContextMixing(16, 2, smk_size=9), "smk_size is 9; it is odd, at least 1 and at most kernel_size, 7"),
        (lambda: ContextMixing(16, 2, context_dim=8)(torch.randn(1, 16, 8, 8)), "context has 16 channels; .* from 8"),
        (lambda: ContextMixingTokens(16, 2, attn_drop=0.1), "no place for attn_drop=0.1"),
        (lambda: ContextMixingTokens(16, 2, qk_norm=True), "no place for qk_norm"),
        (lambda: ContextMixingTokens(16, 2)(torch.randn(1, 12, 16), grid=(5, 2)), "12 tokens do not form a grid of 5 by 2"),
        (lambda: neighborhood_mix(torch.ones(1, 1, 4, 4, 8), torch.ones(1, 1, 4, 4, 2)), r"do not fit; .*K \* K"),
        (lambda: neighborhood_mix(torch.ones(1, 1, 4, 2, 9), torch.ones(1, 1, 4, 2, 2)), "window of 3 by 3 is larger than the map of 4 by 2"),
        (lambda: neighborhood_mix(torch.ones(1, 1, 4, 4, 9), torch.ones(1, 1, 4, 4, 2).double()), "one type and device"),
    ],
    ids=["width", "even kernel", "large small kernel", "context", "dropout", "qk norm", "grid", "shapes", "window", "types"],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_masks_and_torchscript_are_refused():
    layer = ContextMixingTokens(16, 2)
    with pytest.raises(NotImplementedError, match="ContextMixingTokens takes no attention mask"):
        layer(torch.randn(1, 16, 16), attn_mask=torch.ones(16, 16))
    for refused in (layer, ContextMixing(16, 2)):
        with pytest.raises(RuntimeError, match="cannot be turned into TorchScript"):
            torch.jit.script(refused)
