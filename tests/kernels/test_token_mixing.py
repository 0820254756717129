"""The operators around attention: Triton's kernels, run by its interpreter, against PyTorch in fp64; outputs and every gradient."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.block_sparse.tiles import SHARED_EVERYWHERE
from foveal.kernels.token_mixing import (
    add_rms_norm,
    depthwise_conv,
    log_gates,
    mix_branches,
    patch_conv,
    rms_norm,
    swiglu,
    takes_patch_conv,
)
from foveal.kernels.token_mixing.launching import Form

BOUND = {torch.float32: 2e-6, torch.float16: 2e-3}
HALF = pytest.mark.parametrize("dtype", list(BOUND), ids=["fp32", "fp16"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def laws(call, leaves: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """``call(implementation, *leaves)``: the kernels in ``dtype`` and PyTorch in fp64 agree, with and without gradients."""
    results = []
    for kind, implementation in ((dtype, "triton"), (torch.float64, "torch")):
        own = [x.to(dtype).to(kind).requires_grad_() for x in leaves]
        outs = call(implementation, *own)
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = sum((o.double() * draw(*o.shape, seed=9)).sum() for o in outs)
        results.append([*outs, *torch.autograd.grad(loss, own)])
        with torch.no_grad():
            again = call(implementation, *own)
        again = again if isinstance(again, tuple) else (again,)
        assert all(torch.equal(a, o) for a, o in zip(again, outs, strict=True))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.shape == want.shape
        error = (got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-300)
        assert error < BOUND[dtype], f"result {i}: {error:.2e}"


@HALF
@pytest.mark.parametrize(
    ("size", "grid", "silu", "bias"),
    [(3, (5, 7), True, False), (5, (4, 3), False, True), (3, (1, 9), True, True), (7, (2, 2), False, False)],
    ids=["3x3 silu", "5x5 bias", "one row", "kernel larger than the map"],
)
def test_depthwise_conv_equals_conv2d(dtype, size, grid, silu, bias):
    def call(implementation, x, w, b):
        return depthwise_conv(x, grid, w, b if bias else None, silu, implementation=implementation) + (
            0 if bias else 0 * b
        )

    laws(call, [draw(2, grid[0] * grid[1], 20), draw(20, 1, size, size) / size, draw(20)], dtype)


def test_depthwise_conv_takes_tokens_behind_a_prefix_where_they_lie():
    x, w = draw(2, 3 + 12, 8).float(), draw(8, 1, 3, 3).float()
    for implementation in ("triton", "torch"):
        got = depthwise_conv(x[:, 3:], (3, 4), w, implementation=implementation)
        want = F.conv2d(x[:, 3:].mT.reshape(2, 8, 3, 4), w, padding=1, groups=8).flatten(2).mT
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert got.is_contiguous()


def test_a_kernel_that_points_up_moves_rows_down():
    w = torch.zeros(4, 1, 3, 3)
    w[:, 0, 0, 1] = 1
    x = draw(1, 6, 4).float()
    got = depthwise_conv(x, (3, 2), w, implementation="triton")
    assert (got[:, :2] == 0).all() and torch.equal(got[:, 2:], x[:, :-2])


@HALF
@pytest.mark.parametrize("width", [48, 192], ids=["48", "192"])
def test_rms_norm_equals_its_definition(dtype, width):
    laws(lambda how, x, w: rms_norm(x, w, 1e-5, implementation=how), [draw(3, 11, width), draw(width)], dtype)


@HALF
def test_add_rms_norm_gives_the_sum_and_its_norm(dtype):
    laws(
        lambda how, x, y, w: add_rms_norm(x, y, w, implementation=how),
        [draw(2, 9, 24), draw(2, 9, 24, seed=1), draw(24)],
        dtype,
    )


def test_a_wide_residual_takes_a_half_precision_branch_and_a_half_precision_norm():
    x, y = draw(2, 9, 24).float().requires_grad_(), draw(2, 9, 24, seed=1).half().requires_grad_()
    both, normed = add_rms_norm(x, y, torch.ones(24), dtype=torch.float16, implementation="triton")
    assert (both.dtype, normed.dtype) == (torch.float32, torch.float16)
    assert torch.equal(both, x + y)
    (both.sum() + normed.float().square().sum()).backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(x.grad, y.grad.float(), atol=2e-3, rtol=2e-3)


@HALF
@pytest.mark.parametrize("silu", [False, True], ids=["none", "silu"])
def test_mix_of_branches_equals_its_definition(dtype, silu):
    joint = draw(2, 7, 3 * 20 + 6)

    def call(how, local, seen, joint, wl, ws, bias):
        logits = joint[..., 6:].chunk(3, -1)[1][..., : local.shape[-1]]
        return mix_branches(
            local, seen.transpose(1, 2), logits, wl, ws, bias=bias, seen_eps=1e-3, silu=silu, implementation=how
        )

    laws(call, [draw(2, 7, 20), draw(2, 7, 2, 10), joint, draw(10), draw(10, seed=2), draw(20)], dtype)


@pytest.mark.parametrize("side", [0, 1], ids=["local", "seen"])
def test_a_wide_open_mix_hides_the_other_branch(side):
    local, seen = draw(1, 5, 8).float(), draw(1, 2, 5, 4).float()
    logits = torch.full((1, 5, 8), 1e4 if side else -1e4)
    got = mix_branches(local, seen, logits, torch.ones(4), torch.ones(4), implementation="triton")
    branch = seen.transpose(1, 2) if side else local.unflatten(-1, (2, 4))
    torch.testing.assert_close(got, rms_norm(branch, torch.ones(4), implementation="torch").flatten(2))


@HALF
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_log_gates_equal_their_definition(dtype, bias):
    joint = draw(2, 9, 30)

    def call(how, joint, w, b):
        return log_gates(joint[..., 10:26], w, b if bias else None, 3.0, implementation=how) + (0 if bias else 0 * b)

    laws(call, [joint, draw(20, 16), draw(20)], dtype)


def test_log_gates_neither_overflow_nor_lose_small_values():
    x = torch.tensor([[-200.0], [-30.0], [0.0], [30.0], [200.0]])
    got = log_gates(x, torch.ones(1, 1), temper=1.0, implementation="triton")
    torch.testing.assert_close(got, F.logsigmoid(x))


@HALF
def test_swiglu_equals_its_definition(dtype):
    laws(lambda how, x: swiglu(x[..., 2:], implementation=how), [draw(3, 5, 2 + 2 * 12)], dtype)


def test_backward_gives_the_same_bits_every_time():
    def run() -> list[Tensor]:
        own = [draw(2, 60, 12).float(), draw(12, 1, 3, 3).float(), draw(12).float()]
        own = [x.requires_grad_() for x in own]
        y = depthwise_conv(own[0], (6, 10), own[1], None, True, implementation="triton")
        return list(torch.autograd.grad(rms_norm(y, own[2], implementation="triton").sin().sum(), own))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: depthwise_conv(torch.zeros(1, 6, 4), (2, 2), torch.zeros(4, 1, 3, 3)), r"do not lie on a grid of 2 by 2"),
        (lambda: depthwise_conv(torch.zeros(1, 4, 4), (2, 2), torch.zeros(4, 1, 2, 2)), r"need \[4, 1, K, K\] with K odd"),
        (lambda: rms_norm(torch.zeros(2, 4), torch.zeros(3)), r"one number a channel"),
        (lambda: add_rms_norm(torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(4)), r"pass tensors of one shape"),
        (lambda: mix_branches(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 4), torch.zeros(2), torch.zeros(2)), r"\[B, N, H \* V\]"),
        (lambda: log_gates(torch.zeros(2, 4), torch.zeros(3, 5)), r"it is \[G, 4\]"),
        (lambda: swiglu(torch.zeros(2, 5)), r"an odd number"),
        (lambda: swiglu(torch.zeros(2, 4), implementation="cuda"), r"choose one of triton, torch"),
        (lambda: swiglu(torch.zeros(2, 4).double(), implementation="triton"), r"fp16, bf16 or fp32 tensors"),
    ],
    ids=["grid", "even kernel", "norm", "add", "mix", "gates", "swiglu", "name", "dtype"],
)  # fmt: skip
def test_errors_are_sentences(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_compiled_graphs_hold_the_operators_whole():
    def f(x: Tensor, w: Tensor, norm: Tensor, gate: Tensor) -> Tensor:
        x = depthwise_conv(x, (3, 4), w, silu=True, implementation="triton")
        x, y = add_rms_norm(x, x, norm, implementation="triton")
        y = swiglu(torch.cat([y, log_gates(x, gate, implementation="triton")], -1), implementation="triton")
        return mix_branches(y, x.unflatten(-1, (2, 4)).transpose(1, 2), y, norm[:4], norm[4:], implementation="triton")

    leaves = [draw(1, 12, 8), draw(8, 1, 3, 3), draw(8), draw(8, 8)]
    results = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        own = [x.float().requires_grad_() for x in leaves]
        y = call(*own)
        results.append([y, *torch.autograd.grad(y.sin().sum(), own)])
        with torch.no_grad():
            results[-1].append(call(*own))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@HALF
@pytest.mark.parametrize("size", [(40, 32), (37, 50)], ids=["even", "odd"])
def test_the_stem_equals_convolution_norm_and_activation(dtype, size):
    image, weights = draw(2, 3, *size).to(dtype), [draw(24, 3, 9, 9) / 16, draw(24), draw(24, seed=1), draw(24, seed=2)]
    weights = [w.to(dtype) for w in weights]
    got = patch_conv(image, *weights, 8, 1, implementation="triton")
    want = patch_conv(image.double(), *(w.double() for w in weights), 8, 1, implementation="torch")
    assert (got.double() - want).norm() / want.norm() < BOUND[dtype]
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_what_has_no_backward_runs_step_by_step_where_gradients_are_wanted():
    own = [draw(1, 3, 20, 20), draw(8, 3, 9, 9) / 16, draw(8), draw(8, seed=1), draw(8, seed=2)]
    own = [x.float().requires_grad_() for x in own]
    assert not takes_patch_conv(*own)
    patch_conv(*own, 8, 1).sum().backward()
    assert all(x.grad is not None for x in own)
    with pytest.raises(ValueError, match=r"gradients are wanted; leave implementation out"):
        patch_conv(*own, 8, 1, implementation="triton")


class Compiled:
    function, packed_metadata = "function", "facts"

    def __init__(self) -> None:
        self.started = []

    def run(self, *args):
        self.started.append(args)


class Kernel:
    """Asked for, it hands back its compiled form."""

    def __init__(self) -> None:
        self.arg_names, self.asked, self.compiled = ["X", "x_n", "T", "eps", "B", "A"], [], Compiled()

    def __getitem__(self, programs):
        return lambda *args, **switches: self.asked.append((programs, args, switches)) or self.compiled


class Card:
    """A tensor on a GPU, as far as starting a kernel looks."""

    dtype = torch.float16

    def __init__(self, pointer: int) -> None:
        self.data_ptr, self.get_device = lambda: pointer, lambda: 0


def test_a_kernel_is_asked_for_once_and_then_started_with_its_arguments_in_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream {device}", raising=False)
    kernel = Kernel()
    form = Form(kernel, {"A": 1, "B": True}, num_warps=4)
    even, odd = Card(1 << 20), Card((1 << 20) + 2)
    for _ in range(3):
        form(7, (even,), (32,), (5,), (0.5,))
    assert kernel.asked == [((7,), (even, 32, 5, 0.5), {"B": True, "A": 1, "num_warps": 4})]
    start = (7, 1, 1, "stream 0", "function", "facts", None, None, None)
    assert kernel.compiled.started == [(*start, 1 << 20, 32, 5, 0.5, True, 1)] * 2
    for tensors, strides in (((odd,), (32,)), ((even,), (33,)), ((even,), (1 << 31,))):
        form(7, tensors, strides, (5,), (0.5,))
    assert len(kernel.asked) == 4 and len(kernel.compiled.started) == 2


@pytest.mark.slow
def test_kernels_compile_without_spills_and_sizes_are_not_specialised():
    # A process of its own: here Triton's interpreter stands in for its compiler.
    command = [sys.executable, "-m", "foveal.kernels.token_mixing.compiling", "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["capability"] for row in found} == {90} and "mix_and_mlp" in {row["kernel"] for row in found}
    for row in found:
        assert row["spill"] == 0 and row["specialised_sizes"] == [], row
        assert row["shared"] <= (113 * 1024 if row["kernel"] == "mix_and_mlp" else SHARED_EVERYWHERE), row
