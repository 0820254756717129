"""Multi-head scan: routes visit every patch once, the layer against its definition, and its place in timm's vision transformers."""

import math

import pytest
import timm
import torch
from timm.layers import get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import foveal
from foveal.plugins.accelerate import AccelerateError
from foveal.vision import bind_grid
from foveal.vision.scan_routes import PATTERNS, ROUTES, ScanAttention, fuse, head_orders, scan_route
from foveal.vision.vig_mixer import BidirectionalMixer

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "patch_size": 8, "img_size": 56}
GRIDS = {"square": (5, 5), "wide": (3, 7), "tall": (6, 2), "row": (1, 4), "column": (4, 1), "one": (1, 1)}


def layer(plane=(3, 4), prefix=0, **options):
    torch.manual_seed(0)
    made = ScanAttention(24, 3, qkv_bias=True, num_prefix_tokens=prefix, **options).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4)
    made.where.grid = plane
    return made


def tokens(n, dim=24, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def vit(kind="foveal.scan", bind=True, **options):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=kind, **(TINY | options)).eval()
    return bind_grid(model) if bind else model


def pictures(height=56, width=56, dtype=torch.float32):
    return torch.randn(2, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(2))


# ---- routes
@pytest.mark.parametrize("plane", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("kind", ROUTES)
def test_a_route_visits_every_patch_once(kind, plane):
    route = scan_route(kind, *plane)
    assert route.dtype == torch.int64 and route.sort().values.tolist() == list(range(plane[0] * plane[1]))


EXAMPLES = {
    "row": [0, 1, 2, 3, 4, 5], "col": [0, 3, 1, 4, 2, 5], "serp_row": [0, 1, 2, 5, 4, 3], "serp_col": [0, 3, 4, 1, 2, 5],
    "diag": [0, 1, 3, 4, 2, 5], "antidiag": [2, 1, 5, 4, 0, 3], "spiral": [0, 1, 2, 5, 4, 3], "antispiral": [2, 1, 0, 3, 4, 5],
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUTES)
def test_routes_of_two_rows_by_three(kind):
    assert scan_route(kind, 2, 3).tolist() == EXAMPLES[kind]


@pytest.mark.parametrize("kind", [k for k in ROUTES if k not in ("row", "col")])
@pytest.mark.parametrize("plane", [(5, 5), (3, 7), (6, 2)], ids=str)
def test_every_step_goes_to_a_neighbour(kind, plane):
    """Of the eight around a patch; line by line scans jump, these do not."""
    route = scan_route(kind, *plane)
    steps = torch.stack([route // plane[1], route % plane[1]]).diff(dim=1).abs()
    assert (steps.amax(0) == 1).all()


@pytest.mark.parametrize("kind", ["row", "serp_row", "diag", "spiral"])
def test_twins_are_the_same_route_of_the_mirrored_grid(kind):
    twin, (height, width) = {"row": "col", "serp_row": "serp_col"}.get(kind, f"anti{kind}"), (4, 5)
    places = torch.arange(height * width).view(height, width)
    if twin.startswith("anti"):
        assert torch.equal(scan_route(twin, height, width), places.flip(1).flatten()[scan_route(kind, height, width)])
    else:
        assert torch.equal(scan_route(twin, height, width), places.T.flatten()[scan_route(kind, width, height)])


def test_heads_share_out_the_patterns_and_prefix_tokens_come_first():
    order, inverse = head_orders(("spiral", "raster"), 3, (3, 4), 2, torch.device("cpu"))
    kinds = ["spiral", "row", "spiral", "antispiral", "col", "antispiral"]
    assert order.shape == (1, 6, 14)
    for row, kind in zip(order[0], kinds, strict=True):
        assert row[:2].tolist() == [0, 1] and torch.equal(row[2:] - 2, scan_route(kind, 3, 4))
    assert torch.equal(order.gather(2, inverse), torch.arange(14).expand(1, 6, -1))


# ---- fusion
def test_variation_weighs_by_disagreement():
    parts = [torch.tensor(x, dtype=torch.float64) for x in ((1.0, 2.0), (1.0, 4.0), (1.0, 6.0), (1.0, 0.0))]
    deviation = math.sqrt((1 + 1 + 9 + 9) / 3)
    want = 12 * deviation / (3 + 1e-5)
    for threshold in (0.0, 0.5):
        expected = torch.tensor([0.0, want - 12 * threshold], dtype=torch.float64)
        torch.testing.assert_close(fuse(parts, "variation", threshold), expected, **CLOSE)
    assert (fuse(parts, "variation", 10.0) == 0).all()
    torch.testing.assert_close(fuse(parts, "mean"), torch.tensor([1.0, 3.0]).double())
    alike = torch.ones(3, requires_grad=True)
    fuse([alike, alike, alike, alike], "variation").sum().backward()
    assert alike.grad.isfinite().all()


# ---- the layer
def by_definition(m, x, plane, prefix):
    """Head by head, direction by direction, token by token. -> [B, N, D]"""
    rows, columns = plane
    patches = m.local(x[:, prefix:].mT.unflatten(2, plane)).flatten(2).mT
    x = torch.cat([x[:, :prefix], patches], 1)
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)) for t in m.qkv(x).chunk(3, -1))
    gates = (torch.nn.functional.logsigmoid(m.gk_proj(x)) / m.temper).exp().unflatten(-1, (2, 2, m.num_heads, -1))
    seen = torch.zeros_like(v)
    for h in range(m.num_heads):
        parts = []
        for side, kind in enumerate(PATTERNS[m.patterns[h % len(m.patterns)]]):
            visits = [*range(prefix), *(prefix + scan_route(kind, rows, columns)).tolist()]
            for back in (0, 1):
                state, part = torch.zeros(x.shape[0], v.shape[-1], v.shape[-1], dtype=x.dtype), [None] * len(visits)
                for t in reversed(visits) if back else visits:
                    state = gates[:, t, back, side, h, :, None] * state + k[:, t, h, :, None] * v[:, t, h, None]
                    part[t] = v.shape[-1] ** -0.5 * torch.einsum("bk,bkv->bv", q[:, t, h], state)
                parts.append(torch.stack(part, 1))
        seen[:, :, h] = fuse(parts, m.fusion, m.threshold)
    mix = m.g_proj(x).sigmoid().unflatten(-1, (m.num_heads, -1))
    mix = torch.cat([torch.ones_like(mix[:, :prefix]), mix[:, prefix:]], 1)
    near = m.l_norm(x.unflatten(-1, (m.num_heads, -1)))
    return m.proj((mix * m.g_norm(seen) + (1 - mix) * near).flatten(2))


@pytest.mark.parametrize("fusion", ["mean", "variation"])
@pytest.mark.parametrize("prefix", [0, 1, 5], ids="prefix-{}".format)
@pytest.mark.parametrize("plane", [(3, 4), (1, 5)], ids=str)
def test_equals_the_definition_and_so_do_the_gradients(fusion, prefix, plane):
    m, outs, grads = layer(plane, prefix, fusion=fusion, threshold=0.05, patterns=("diagonal", "raster")), [], []
    for run in (m, lambda x: by_definition(m, x, plane, prefix)):
        x = tokens(prefix + plane[0] * plane[1]).requires_grad_()
        outs.append(run(x))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [x, *m.parameters()]))
    torch.testing.assert_close(outs[0], outs[1], **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_every_token_sees_every_other():
    """Ahead or back, on each route alone: patches see the prefix, the prefix sees patches."""
    m, x = layer((3, 4), 2, patterns=("spiral",)), tokens(14, batch=1)
    plain = m(x)
    for t in range(14):
        changed = x.clone()
        changed[:, t] += 1
        assert ((m(changed) - plain).abs().amax(-1) > 1e-9).all()


@torch.no_grad()
def test_transposed_pictures_give_transposed_outputs_when_routes_change_places():
    """Rows and columns are one pattern: with kernels transposed and gates of the two routes swapped, the layer is its own mirror."""
    m, x = layer((3, 4), patterns=("raster",)), tokens(12)
    twin = layer((4, 3), patterns=("raster",))
    twin.load_state_dict(m.state_dict())
    twin.local.weight.copy_(m.local.weight.mT)
    for name in ("weight", "bias"):
        own = getattr(m.gk_proj[1], name).unflatten(0, (2, 2, 24))
        getattr(twin.gk_proj[1], name).copy_(own.flip(1).flatten(0, 2))
    turn = torch.arange(12).view(3, 4).T.flatten()
    torch.testing.assert_close(twin(x[:, turn]), m(x)[:, turn], **CLOSE)


@torch.no_grad()
def test_one_row_of_patches_is_vigs_scan():
    """On a grid of one row both routes are the row; with gates of ViG's this is its bidirectional scan, before norms and projections."""
    m, x = layer((1, 7), patterns=("raster",)), tokens(7)
    for name in ("weight", "bias"):
        gate = getattr(m.gk_proj[1], name).unflatten(0, (2, 2, 24))
        gate[:, 1] = gate[:, 0]
    from foveal.vision.vig_mixer import bidirectional_gated_linear_attention as scan

    q, k, v = m.project(x)
    ahead, back = (g[:, :3] for g in m._gates(x))
    torch.testing.assert_close(m._scan(x, 0, (1, 7)), scan(q, k, v, ahead, back, scale=0.5 * m.scale), **CLOSE)
    assert BidirectionalMixer(24, 3).g_norm.weight.shape == m.g_norm.weight.shape


# ---- in timm
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}], ids=["class", "registers", "none"])  # fmt: skip
@torch.no_grad()
def test_models_take_pictures_of_any_size_and_tell_shapes_apart(options):
    model = vit(dynamic_img_size=True, **options)
    for size in ((56, 56), (40, 72), (72, 40)):
        assert model(pictures(*size)).isfinite().all() and model.blocks[0].attn.where.grid == (
            size[0] // 8,
            size[1] // 8,
        )
    m, x = model.blocks[0].attn, torch.randn(1, 36 + model.num_prefix_tokens, 24)
    outs = []
    for m.where.grid in ((6, 6), (4, 9), (9, 4)):
        outs.append(m(x))
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])


def test_weights_of_plain_models_load_and_a_model_round_trips():
    plain = timm.create_model("vit_tiny_patch16_224", **TINY)
    model = vit()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    new = {"local.weight", "gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias", "g_proj.weight", "g_proj.bias", "g_norm.weight", "l_norm.weight"}  # fmt: skip
    assert not unexpected and set(missing) == {f"blocks.{i}.attn.{n}" for i in (0, 1) for n in new}
    again = vit()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(pictures()), model(pictures()))


@pytest.mark.parametrize("fusion", ["mean", "variation"])
def test_checkpointing_changes_no_gradient_even_for_pictures_of_two_shapes(fusion):
    """40 x 72 and 72 x 40 pixels have as many tokens: only the grid tells them apart when blocks run again."""
    grads = []
    for on in (False, True):
        model = vit(ScanAttention.with_options(fusion=fusion), dynamic_img_size=True).double().train()
        model.set_grad_checkpointing(on)
        outs = [model(pictures(*size, torch.float64)) for size in ((40, 72), (72, 40))]
        sum(out.square().sum() for out in outs).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None and a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_narrow_types_keep_wide_gates():
    model, x = vit(qk_norm=True, scale_attn_norm=True), pictures()
    plain, seen = model(x), []
    model.blocks[0].attn.register_forward_pre_hook(lambda m, args: seen.append(m._gates(args[0])[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), plain, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), plain, rtol=0.1, atol=0.1)
    assert seen == [torch.float32] * 2


@torch.no_grad()
def test_traced_and_compiled_models_agree_and_torchscript_is_refused():
    model, x = vit(bind=False, class_token=False, global_pool="avg", depth=1), pictures()
    plain = model(x)
    leaves = {"leaf_modules": list(get_notrace_modules())}
    graph = create_feature_extractor(
        model, [get_graph_node_names(model, tracer_kwargs=leaves)[0][-1]], tracer_kwargs=leaves
    )
    assert torch.equal(next(iter(graph.eval()(x).values())), plain)
    torch.testing.assert_close(torch.compile(bind_grid(model), backend="eager")(x), plain)
    with pytest.raises(RuntimeError, match=r"ScanAttention cannot be turned into TorchScript.*use torch\.compile"):
        torch.jit.script(model)


# ---- refusals
def test_bad_settings_are_refused_in_a_sentence():
    for arguments, message in (
        ({"dim": 30, "num_heads": 4}, "30 is not divisible by"), ({"dim": 24, "num_heads": 2}, "3 patterns for 2 heads"),
        ({"dim": 24, "num_heads": 3, "patterns": ("zigzag",)}, r"patterns is \('zigzag',\); give a list of 'serpentine', 'diagonal'"),
        ({"dim": 24, "num_heads": 3, "patterns": "spiral"}, "patterns is 'spiral'; give a list"),
        ({"dim": 24, "num_heads": 3, "fusion": "max"}, "no fusion 'max'; choose from 'mean', 'variation'"),
        ({"dim": 24, "num_heads": 3, "attn_drop": 0.1}, r"attn_drop is 0\.1; a scan has no attention weights"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ScanAttention(**arguments)
    with pytest.raises(ValueError, match="no scan route 'zigzag'; choose from 'row', 'col'"):
        scan_route("zigzag", 2, 2)
    with pytest.raises(ValueError, match="0 by 3; at least one patch"):
        scan_route("row", 0, 3)


def test_calls_that_cannot_be_placed_or_masked_are_refused():
    m = layer((3, 4), 1)
    with pytest.raises(ValueError, match="12 tokens do not form a grid of 3 by 4 plus 1 prefix"):
        m(tokens(12))
    with pytest.raises(ValueError, match="50 tokens do not form a square grid plus 0 prefix"):
        vit(bind=False)(pictures())
    for options in ({"attn_mask": torch.ones(13, 13).bool()}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match="ScanAttention takes no"):
            m(tokens(13), **options)


def test_accelerate_leaves_scans_alone_and_says_so():
    with pytest.raises(AccelerateError, match=r"left as it is: ScanAttention \(2 layers\): it"):
        foveal.accelerate(vit(), "neighborhood", window=3)
