"""Norm, rotation and order of queries and keys: plain PyTorch against the formulas in fp64, the kernel against plain PyTorch."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from foveal.kernels.query_key import Norm, Rotation, norm_and_rotate, refusal

B, N, H, D = 2, 11, 3, 16
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3}
SWITCHES = ("across", "twice", "weight", "shared", "ordered")


def draw(dtype, across=False, twice=False, weight=True, shared=False, ordered=False):
    """q, k as parts of one projection, and what is done to them."""
    torch.manual_seed(0)
    parts = torch.randn(B, N, 3 * H * D).to(dtype).chunk(3, dim=-1)
    q, k = (x.unflatten(2, (H, D)) for x in parts[:2])
    weights = [(1 + torch.randn(H * D if across else D) / 3).to(dtype) if weight else None for _ in range(2)]
    norms = tuple(Norm(w, eps, across, twice) for w, eps in zip(weights, (1e-6, 1e-2), strict=True))
    order = torch.randperm(N)[:7] if ordered else None
    return q, k, norms, Rotation(torch.randn(N, D), torch.randn(N, D), shared), order


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def by_hand(x, norm, rotation):
    """Complex numbers in fp64."""
    x, dims = x.double(), (2, 3) if norm.across else (3,)
    y = x / (x.square().mean(dims, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        y = y * norm.weight.double().view(x.shape[2:] if norm.across else (D,))
    turn = torch.complex(rotation.cos[:, 0::2].double(), rotation.sin[:, 1::2].double())
    turned = torch.view_as_complex(y.unflatten(3, (-1, 2)).contiguous()) * turn[None, :, None]
    return torch.view_as_real(turned).flatten(3)


@pytest.mark.parametrize("across", [False, True], ids=["each head", "across heads"])
def test_plain_pytorch_equals_the_formulas(across):
    q, k, norms, rotation, _ = draw(torch.float32, across=across, shared=True)
    made = norm_and_rotate(q, k, norms, rotation, implementation="torch")
    for got, x, norm in zip(made, (q, k), norms, strict=True):
        assert relative(got, by_hand(x, norm, rotation)) < 1e-6


def test_a_table_of_its_own_for_each_channel_is_the_shared_one_where_they_agree():
    q, k, norms, *_ = draw(torch.float32)
    angles = torch.rand(N, D // 2).repeat_interleave(2, dim=1)
    each, shared = (Rotation(angles.cos(), angles.sin(), shared) for shared in (False, True))
    a, b = (norm_and_rotate(q, k, norms, r, implementation="torch") for r in (each, shared))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("on", [c for n in range(6) for c in itertools.combinations(SWITCHES, n)], ids="+".join)
@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16"])
def test_the_kernel_equals_plain_pytorch(dtype, on):
    q, k, norms, rotation, order = draw(dtype, **{name: name in on for name in SWITCHES})
    got = norm_and_rotate(q, k, norms, rotation, order=order, implementation="triton")
    want = norm_and_rotate(q, k, norms, rotation, order=order, implementation="torch")
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and relative(a, b) < BOUND[dtype]
        assert dtype == torch.float32 or (a != b).float().mean() < 0.01  # rounded at the same places


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 4, 1), (16, 2, 4)], ids=str)
def test_tiles_change_nothing(tile):
    from foveal.kernels.query_key.portable import launch

    q, k, norms, rotation, _ = draw(torch.float32, across=True)
    out = torch.empty(2, B, N, H, D)
    launch(q, k, norms, rotation, None, (out[0], out[1]), tile=tile)
    want = norm_and_rotate(q, k, norms, rotation, implementation="torch")
    assert relative(out[0], want[0]) < 1e-6 and relative(out[1], want[1]) < 1e-6


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_parts_of_a_joint_sequence_are_written_in_place(implementation):
    q, k, norms, rotation, order = draw(torch.float32, ordered=True)
    joint = torch.full((2, B, 20, H, D), 7.0)
    out = norm_and_rotate(
        q, k, norms, rotation, order=order, out=(joint[0, :, 5:12], joint[1, :, 5:12]), implementation=implementation
    )
    want = norm_and_rotate(q, k, norms, rotation, order=order, implementation="torch")
    assert out[0].data_ptr() == joint[0, :, 5:].data_ptr() and relative(joint[1, :, 5:12], want[1]) < 1e-6
    assert (joint[:, :, :5] == 7).all() and (joint[:, :, 12:] == 7).all()


def test_text_without_a_position_is_only_normed():
    q, k, norms, _, _ = draw(torch.float32)
    got, _ = norm_and_rotate(q, k, norms, implementation="triton")
    assert relative(got, torch.nn.functional.rms_norm(q, (D,), norms[0].weight, norms[0].eps)) < 1e-6


def changed(**changes):
    q, k, norms, rotation, _ = draw(torch.float32)
    return tuple({"q": q, "k": k, "norms": norms, "rotation": rotation, **changes}.values())


REFUSED = {
    "other keys": (changed(k=torch.zeros(B, N, H + 1, D)), "queries and keys differ"),
    "scattered heads": (changed(q=torch.zeros(B, H, N, D).transpose(1, 2)), "do not lie together"),
    "an odd width": (changed(q=torch.zeros(B, N, H, 24), k=torch.zeros(B, N, H, 24)), "not a power of two"),
    "two kinds of norm": (changed(norms=(Norm(None, 1e-6), Norm(torch.ones(D), 1e-6))), "differ in kind"),
    "a weight of another dtype": (changed(norms=(Norm(torch.ones(D).half(), 1e-6),) * 2), "weight is torch.float16"),
    "a weight of another width": (changed(norms=(Norm(torch.ones(H * D), 1e-6),) * 2), r"shape \(48,\), not \(16,\)"),
    "a short table": (
        changed(rotation=Rotation(torch.ones(5, D), torch.ones(5, D))),
        r"shape \(5, 16\), not \(11, 16\)",
    ),
    "a coarse table": (changed(rotation=Rotation(*(torch.ones(N, D).half(),) * 2)), "must be torch.float32"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_kernel_cannot_take_is_one_sentence(kind):
    call, sentence = REFUSED[kind]
    assert refusal(*call, by_name=True)
    with pytest.raises(ValueError, match=sentence):
        norm_and_rotate(*call, implementation="triton")


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"no implementation 'tritn'; leave implementation out, or choose torch"):
        norm_and_rotate(*changed(), implementation="tritn")


def test_a_cpu_runs_plain_pytorch_unless_told():
    call = changed()
    assert refusal(*call) == "it runs on cuda, q is on cpu"
    assert torch.equal(norm_and_rotate(*call)[0], norm_and_rotate(*call, implementation="torch")[0])


@pytest.mark.slow
def test_every_chip_compiles_without_spills():
    # A process of its own: here Triton's interpreter stands in for its compiler.
    command = [sys.executable, "-m", "foveal.kernels.query_key.compiling"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["capability"] for row in found} == {80, 86, 89, 90, 120}
    assert all(row["spill"] == 0 and row["registers"] <= 160 and row["shared"] <= 16384 for row in found), found
