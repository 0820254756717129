"""ViG's whole blocks, in Triton's interpreter: they equal their layers, with gradients and without, and follow whatever happens to these."""

import copy

import pytest
import timm
import torch
from torch import nn

import foveal.vision  # noqa: F401  (registers the models)

pytest.importorskip("triton")
from foveal.kernels.token_mixing import dispatch
from foveal.vision import vig_block

WIDTHS = pytest.mark.parametrize(("dim", "heads"), [(48, 3), (40, 2)], ids=["narrow", "wide"])
GRID = 2, 3


def block_of(dim: int = 48, heads: int = 3, **extra) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model("vig_tiny_patch16_224", depth=1, embed_dim=dim, num_heads=heads, **extra).blocks[0].eval()
    for p in made.parameters():  # every part must matter
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return made


def tokens(dtype: torch.dtype = torch.float16, dim: int = 48) -> torch.Tensor:
    return torch.randn(2, 6, dim, generator=torch.Generator().manual_seed(3)).to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.fixture
def whole(monkeypatch) -> list:
    """As on a GPU; grows by the answer to every block's question whether it can be whole."""
    answers, asked = [], vig_block.takes_gated_block
    monkeypatch.setattr(dispatch, "fused", lambda name, x, *others: x.dtype != torch.float64)
    monkeypatch.setattr(vig_block, "takes_gated_block", lambda *args: answers.append(asked(*args)) or answers[-1])
    return answers


def oracle(m: nn.Module, dim: int = 48) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(m).double()(tokens(torch.float64, dim), *GRID)


@WIDTHS
@pytest.mark.parametrize("acts", [False, True], ids=["plain", "activated"])
def test_a_block_without_gradients_equals_its_layers(whole, dim, heads, acts):
    m = block_of(dim, heads, conv_act=acts, out_act=acts).half()
    want = oracle(m, dim)
    with torch.no_grad():
        assert error(m(tokens(dim=dim), *GRID), want) < 2e-3
    assert whole == [False, True]


@WIDTHS
@pytest.mark.parametrize("kind", ["fp32", "autocast"])
def test_a_block_with_gradients_equals_its_layers(whole, dim, heads, kind):
    m = block_of(dim, heads).train()
    results = []
    for own, dtype in ((m, torch.float32), (copy.deepcopy(m).double(), torch.float64)):
        x = tokens(dtype, dim).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=kind == "autocast" and own is m):
            y = own(x, *GRID)
        results.append([y, *torch.autograd.grad(y.double().sin().sum() * 64, [x, *own.parameters()])])
    assert whole == [True, False]
    for got, want, name in zip(*results, ["y", "x", *[n for n, _ in m.named_parameters()]], strict=True):
        assert error(got, want) < (1e-5 if kind == "fp32" else 1e-2), name


def _edit(m):
    m.attn.qkv_proj.weight.mul_(-1)


def _edit_data(m):
    m.attn.g_proj.weight.data.mul_(-2)


def _load(m):
    m.load_state_dict({n: -x for n, x in m.state_dict().items()})


def _assign(m):
    m.load_state_dict({n: -x for n, x in m.state_dict().items()}, assign=True)


def _replace(m):
    m.attn.gk_proj[0].weight = nn.Parameter(-m.attn.gk_proj[0].weight)


def _move(m):
    m.float().half()


@pytest.mark.parametrize(
    "change", [_edit, _edit_data, _load, _assign, _replace, _move, copy.deepcopy], ids=lambda f: f.__name__
)
def test_a_whole_block_follows_its_weights(whole, change):
    m = block_of().half()
    with torch.no_grad():
        m(tokens(), *GRID)
        m = change(m) or m
        assert error(m(tokens(), *GRID), oracle(m)) < 2e-3
    assert whole.count(True) == 2


LAYERS = (
    "attn", "attn.in_proj", "attn.in_proj.0", "attn.in_proj.1", "attn.qkv_proj", "attn.gk_proj", "attn.gk_proj.0", "attn.gk_proj.1",
    "attn.g_proj", "attn.o_proj", "attn.g_norm", "attn.l_norm", "attn.out_act", "attn_norm", "mlp_norm", "mlp", "mlp.gate_proj",
    "mlp.down_proj", "drop_path",
)  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_block_is_not_whole_while_someone_listens(whole, name):
    m = block_of().half()
    with torch.no_grad():
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            handle = getattr(m.get_submodule(name), register)(lambda *_: None)
            m(tokens(), *GRID)
            assert True not in whole
            handle.remove()
        m(tokens(), *GRID)
    assert whole[-1]


def test_a_layer_that_does_more_than_its_weights_say_is_called(whole):
    m, called = block_of().half(), []
    attn = m.attn
    with torch.no_grad():
        attn.qkv_proj.forward = lambda x: called.append(x) or nn.functional.linear(x, attn.qkv_proj.weight)
        m(tokens(), *GRID)
        assert called
        del attn.qkv_proj.forward
        nn.utils.parametrize.register_parametrization(attn.o_proj, "weight", nn.Tanh())
        assert error(m(tokens(), *GRID), oracle(m)) < 2e-3
        nn.utils.parametrize.remove_parametrizations(attn.o_proj, "weight")
        attn.qkv_proj = nn.Linear(48, 96, dtype=torch.float16)  # with a bias
        assert error(m(tokens(), *GRID), oracle(m)) < 2e-3
        attn.qkv_proj = nn.Linear(48, 96, bias=False, dtype=torch.float16)
        attn.in_proj[0] = nn.Conv2d(48, 48, 3, padding=2, dilation=2, groups=48, bias=False, dtype=torch.float16)
        assert error(m(tokens(), *GRID), oracle(m)) < 2e-3
    assert True not in whole


def test_a_frozen_or_dropping_block_runs_layer_by_layer(whole):
    m = block_of().train()
    m.drop_path = timm.layers.DropPath(0.5)
    with torch.no_grad():
        m(tokens(torch.float32), *GRID)
    m.drop_path = nn.Identity()
    m.attn.o_proj.weight.requires_grad_(False)
    m(tokens(torch.float32), *GRID).sum().backward()
    assert True not in whole and m.attn.o_proj.weight.grad is None


@pytest.mark.parametrize("kind", ["wide weights", "autocast", "one wide weight", "no tokens", "rows apart"])
def test_what_the_kernels_do_not_take_runs_layer_by_layer(whole, kind):
    m, x = block_of(), tokens()
    m = m if kind in ("wide weights", "autocast") else m.half()
    if kind == "one wide weight":
        m.attn.g_proj.bias.data = m.attn.g_proj.bias.data.float()
    if kind == "rows apart":
        m.mlp.down_proj.weight = nn.Parameter(m.mlp.down_proj.weight.t().contiguous().t())
    if kind == "no tokens":
        x = x[:0]
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=kind in ("autocast", "one wide weight")):
        if kind == "wide weights":
            x = x.float()
        assert m(x, *GRID).isfinite().all()
    assert whole == [False]


def test_a_compiled_graph_holds_the_block_as_one_node(whole):
    m, nodes = block_of().half(), []

    def backend(graph, _):
        nodes.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    with torch.no_grad():
        got = torch.compile(m, fullgraph=True, backend=backend)(tokens(), *GRID)
        assert torch.equal(got, m(tokens(), *GRID))
    assert [n for n in nodes if n.startswith("foveal")] == ["foveal.gated_block.default"]
