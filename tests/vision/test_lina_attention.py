"""Laws of LINA's attention module: its weights, gates, masks and convolution; costs; timm's blocks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foveal.vision.lina_attention import LinearAttention, resized_gates
from foveal.vision.lina_counting import attention_macs

NORMS = ("division", "subtraction")
M, SIDE, DIM, HEADS = 4, 4, 16, 2
N = M + SIDE**2


def module(**settings) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(DIM, HEADS, **settings).double()


def released(**settings) -> LinearAttention:
    """With gates and convolution, gates away from 1."""
    made = module(**{"gate": "raw", "tokens": N, "prefix": M, "conv": True, **settings})
    for name in ("key_scale", "value_scale"):
        if hasattr(made, name):
            nn.init.uniform_(getattr(made, name), 0.5, 1.5)
    return made


def tokens(n: int = N, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weights_by_hand(made: LinearAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (weights [B, H, N, N], values [B, H, N, d]) from the definition."""
    q, k, v = made.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
    key, value = made._gates(x)
    key, value = (1.0 if g is None else g for g in (key, value))
    if made.normalisation == "division":
        pairs = (q.relu() + made.eps) @ ((k.relu() + made.eps) * key).mT
        return pairs / (pairs.sum(-1, keepdim=True) + made.eps * x.shape[1]), v * value
    s = made.head_dim**-0.5 * q.relu() @ (k.relu() * key).mT / x.shape[1]
    return s + (1 - s.sum(-1, keepdim=True)) / x.shape[1], v * value


@pytest.mark.parametrize("normalisation", NORMS)
@pytest.mark.parametrize("gate", [None, "raw", "exp", "data"])
def test_the_module_is_its_weights_written_out(normalisation, gate):
    made, x = released(normalisation=normalisation, gate=gate, conv=False), tokens()
    weights, values = weights_by_hand(made, x)
    torch.testing.assert_close(made(x), made.proj((weights @ values).transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)
    assert weights.sum(-1).sub(1).abs().max() < (1e-3 if normalisation == "division" else 1e-12)


def test_the_convolution_reads_the_input_and_leaves_the_prefix_alone():
    made, bare, x = released(), released(conv=False), tokens()
    bare.load_state_dict({k: v for k, v in made.state_dict().items() if "dw_conv" not in k})
    image = made.dw_conv(x[:, M:].mT.unflatten(2, (SIDE, SIDE))).flatten(2).mT
    added = torch.cat([torch.zeros_like(x[:, :M]), image], 1) @ made.proj.weight.mT
    torch.testing.assert_close(made(x) - bare(x), added, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalisation", NORMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "key-mask"])
def test_the_kernels_add_the_convolution_as_pytorch_does(normalisation, masked):
    made, x = released(normalisation=normalisation).float(), tokens().float()
    mask = (torch.arange(N) != 3).expand(2, -1) if masked else None
    results = []
    for name in ("triton", "torch"):
        made.implementation = name
        held = x.clone().requires_grad_()
        out = made(held, key_mask=mask)
        with torch.no_grad():
            torch.testing.assert_close(made(x, key_mask=mask), out.detach(), rtol=0, atol=1e-6)
        results.append([out, *torch.autograd.grad(out.square().sum(), [held, *made.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalisation", NORMS)
def test_without_gates_and_convolution_order_means_nothing(normalisation):
    made, x, order = module(normalisation=normalisation), tokens(), torch.randperm(N)
    torch.testing.assert_close(made(x)[:, order], made(x[:, order]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_head", [True, False], ids=["per-head", "shared"])
@pytest.mark.parametrize("gate", ["raw", "exp"])
def test_fresh_gates_change_nothing(gate, per_head):
    made, bare = module(gate=gate, tokens=N, per_head=per_head), module()
    bare.load_state_dict({k: v for k, v in made.state_dict().items() if "scale" not in k})
    assert made.key_scale.shape == (1, HEADS if per_head else 1, N, 1)
    torch.testing.assert_close(made(tokens()), bare(tokens()), rtol=0, atol=1e-12)


def test_key_gates_times_a_constant_change_nothing_and_value_gates_scale():
    made, x = released(conv=False, proj_bias=False), tokens()
    before = made(x)
    made.key_scale.data *= 3
    torch.testing.assert_close(made(x), before, rtol=0, atol=1e-4)
    made.value_scale.data *= 2
    torch.testing.assert_close(made(x), 2 * before, rtol=0, atol=2e-4)


def test_a_key_gate_of_zero_is_a_masked_key_and_a_masked_key_is_an_absent_one():
    made, x = module(gate="raw", tokens=N, eps=1e-9), tokens()
    keep = torch.arange(N) != 7
    masked = made(x, key_mask=keep.expand(2, -1))
    made.key_scale.data[:, :, 7] = 0
    torch.testing.assert_close(made(x), masked, rtol=0, atol=1e-12)
    bare = module(eps=1e-9)
    bare.load_state_dict({k: v for k, v in made.state_dict().items() if "scale" not in k})
    torch.testing.assert_close(masked[:, keep], bare(x[:, keep]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalisation", NORMS)
def test_every_sample_has_its_own_key_mask(normalisation):
    made, x = module(normalisation=normalisation, eps=1e-9), tokens(9)
    mask = torch.arange(9) < torch.tensor([[5], [8]])
    both = made(x, key_mask=mask)
    for i, n in enumerate((5, 8)):
        torch.testing.assert_close(both[i, :n], made(x[i : i + 1, :n])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(made(x, attn_mask=mask[:, None, None]), both, rtol=0, atol=0)


@pytest.mark.parametrize("normalisation", NORMS)
def test_tokens_twice_are_tokens_once_and_one_token_is_its_value(normalisation):
    made, x = module(normalisation=normalisation), tokens(6)
    torch.testing.assert_close(made(torch.cat([x, x], 1))[:, :6], made(x), rtol=0, atol=1e-5)
    value = made.proj(made.qkv(x[:, :1])[..., 2 * DIM :])
    torch.testing.assert_close(made(x[:, :1]), value, rtol=0, atol=1e-4)


def test_half_precision_stays_finite_over_many_tokens():
    made = module().half()
    out = made(60 * torch.ones(1, 16_384, DIM, dtype=torch.float16))
    assert out.dtype == torch.float16 and out.isfinite().all()


def test_autocast_keeps_the_sums_in_fp32():
    made, x = module().float(), tokens(2_000).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    torch.testing.assert_close(out.float(), made(x), rtol=0.05, atol=0.05)


def test_all_parameters_get_the_gradients_of_the_definition():
    made, x = released(conv=False), tokens().requires_grad_()
    made(x).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    weights, values = weights_by_hand(made, x)
    made.proj((weights @ values).transpose(1, 2).flatten(2)).square().sum().backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-9)


# ---- costs
@pytest.mark.parametrize(
    ("n", "saving"),
    [(320, 0.06), (1280, 0.27), (5120, 0.612), (20480, 0.865)],
    ids=["256px", "512px", "1024px", "2048px"],
)
def test_savings_are_those_of_the_paper(n, saving):
    linear, softmax = attention_macs(n, 1536, 16, image_tokens=n * 4 // 5), attention_macs(n, 1536, 16, softmax=True)
    assert 1 - linear / softmax == pytest.approx(saving, abs=0.005)
    if n == 5120:
        assert (linear / 1e9, softmax / 1e9) == pytest.approx((49.99, 128.85), abs=0.01)


def test_the_closed_form_counts_what_the_module_does():
    made = LinearAttention(96, 4, prefix=16, conv=True, device="meta")
    with FlopCounterMode(display=False) as seen:
        made(torch.empty(1, 80, 96, device="meta"))
    assert seen.get_total_flops() == 2 * attention_macs(80, 96, 4, image_tokens=64)


# ---- gates on another grid
def test_resizing_keeps_constant_gates_and_a_grid_of_the_same_size():
    gates = torch.rand(1, 2, N, 1)
    torch.testing.assert_close(resized_gates(gates, SIDE), gates)
    assert resized_gates(torch.full((1, 2, N, 1), 1.5), 8).eq(1.5).all() and resized_gates(gates, 8).shape == (
        1,
        2,
        80,
        1,
    )
    parts = torch.cat([torch.full((1, 1, M, 1), 2.0), torch.full((1, 1, SIDE**2, 1), 3.0)], 2)
    assert resized_gates(parts, 8)[0, 0, :, 0].tolist() == [2.0] * 16 + [3.0] * 64


# ---- timm
def test_a_timm_vision_transformer_takes_it_as_its_attention():
    timm = pytest.importorskip("timm")

    class Gridded(LinearAttention):
        """Behind one class token."""

        def __init__(self, *args, **settings):
            super().__init__(*args, prefix=1, conv=True, **settings)

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5, attn_layer=Gridded
    )
    assert isinstance(model.blocks[0].attn, LinearAttention) and model.blocks[0].attn.dw_conv is not None
    out = model(torch.randn(2, 3, 64, 64))
    out.sum().backward()
    assert out.shape == (2, 5) and model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


# ---- refusals
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_heads": 3}, "not divisible"),
        ({"normalisation": "softmax"}, "choose one of division, subtraction"),
        ({"gate": "raw"}, "with the number of tokens"),
        ({"gate": "soft"}, "choose None"),
        ({"attn_drop": 0.1}, "leave qk_norm"),
        ({"qk_norm": True}, "leave qk_norm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        LinearAttention(**{"dim": DIM, "num_heads": HEADS, **settings})


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"made for 20 tokens and the input has 21.*resize_gates_"):
        released()(tokens(21))
    with pytest.raises(ValueError, match="form no square grid"):
        module(prefix=M, conv=True)(tokens(M + 15))
    with pytest.raises(NotImplementedError, match="bidirectional"):
        module()(tokens(), is_causal=True)
    with pytest.raises(NotImplementedError, match="bool mask over keys"):
        module()(tokens(), attn_mask=torch.ones(N, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="even grid"):
        resized_gates(torch.ones(1, 2, N, 1), 5)
