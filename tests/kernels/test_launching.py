"""Starting kernels: a kept launch passes on what the first one did, asks the compiler once, and never mistakes one kind of call for another."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, KernelOptions, api, block_sparse_attention, launching
from foveal.kernels.block_sparse.needs import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED["triton"], reason="needs triton")
N, D = 64, 128


@dataclass
class Parameter:
    name: str
    is_constexpr: bool
    do_not_specialize: bool


@dataclass(eq=False)
class Recorder:
    """Stands in for a kernel: keeps the arguments of every start, by name."""

    arg_names: list[str]
    params: list[Parameter]
    compiled: list[dict[str, Any]] = field(default_factory=list)
    started: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, programs):
        def compile_and_start(*args, num_warps=None, num_stages=None, maxnreg=None, **switches):
            named = dict(zip(self.arg_names, args, strict=False)) | switches
            assert set(named) == set(self.arg_names)
            self.compiled.append({"programs": programs} | {n: flat(x) for n, x in named.items()})
            return Compiled(self)

        return compile_and_start


@dataclass
class Compiled:
    kernel: Recorder

    def __getitem__(self, programs):
        def start(*args):
            named = dict(zip(self.kernel.arg_names, args, strict=True))
            assert not any(isinstance(x, Tensor) for x in args)
            self.kernel.started.append({"programs": programs} | {n: flat(x) for n, x in named.items()})

        return start


def flat(x):
    """An argument as the device would see it."""
    if isinstance(x, Tensor):
        return x.data_ptr()
    return (x.base.data_ptr(), *x.shape, *x.strides, *x.block_shape) if hasattr(x, "block_shape") else x


def recorder(kernel, unspecialised):
    parameters = inspect.signature(kernel.fn).parameters
    params = [Parameter(n, "constexpr" in str(p.annotation), n in unspecialised) for n, p in parameters.items()]
    return Recorder(list(parameters), params)


@pytest.fixture(params=["hopper", "portable"])
def kernel(request, monkeypatch):
    """(recorder, call(q, k, v, plan, scale, need_lse, init)) of one implementation, as if the CPU were a compiled-for device."""
    monkeypatch.setattr(launching, "COMPILED_ON", ("cuda", "cpu"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # what device.index says on the CPU
    if request.param == "hopper":
        from foveal.kernels.block_sparse import hopper, hopper_call

        fake = recorder(hopper.block_sparse_hopper, hopper.UNSPECIALISED)
        monkeypatch.setattr(hopper_call, "block_sparse_hopper", fake)
        monkeypatch.setattr(hopper_call, "_processors", lambda _: 132)
        return fake, hopper_call.hopper_attention
    from foveal.kernels.block_sparse import portable, portable_call

    fake = recorder(portable.block_sparse_forward, portable.UNSPECIALISED)
    monkeypatch.setattr(portable_call, "block_sparse_forward", fake)
    return fake, portable_call.triton_attention


def plan(n: int = N, block: int = 16, **more) -> BlockPlan:
    start = torch.arange(0, n, block, dtype=torch.int32)
    count = torch.full((1, 2, n // block), 2, dtype=torch.int32)
    index = torch.arange(2, dtype=torch.int32).expand(1, 2, n // block, 2)
    return BlockPlan(
        n_queries=n, n_keys=n, q_start=start, q_len=torch.full_like(start, block), kv_start=start, kv_len=torch.full_like(start, block),
        count=count, n_full=count, index=index, **more,
    )  # fmt: skip


def draw(kind: str = "tokens first", n: int = N, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v [1, 2, n, D]"""
    if kind == "tokens first":
        return [torch.zeros(1, n, 2, D, dtype=dtype).transpose(1, 2) for _ in range(3)]
    if kind == "heads first":
        return [torch.zeros(1, 2, n, D, dtype=dtype) for _ in range(3)]
    if kind == "one projection":
        return list(torch.zeros(1, n, 3, 2, D, dtype=dtype).permute(2, 0, 3, 1, 4))
    return [
        x[1:].view(1, n, 2, D).transpose(1, 2) for x in torch.zeros(3, n * 2 * D + 1, dtype=dtype)
    ]  # "shifted" by an element


def changed(fake: Recorder, of: str) -> dict[str, Any]:
    """The last start (or compilation), without the outputs, whose place is new every time."""
    return {n: x for n, x in getattr(fake, of)[-1].items() if n not in ("Out", "Lse")}


def of_plan(name: str) -> bool:
    """Whether an argument points into the plan: QStart, Index, ...; Q and H do not."""
    return name[0].isupper() and not name.isupper()


KINDS = ("tokens first", "heads first", "one projection")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_launch_passes_what_the_first_one_passed(kernel, kind):
    fake, call = kernel
    p, qkv = plan(), draw(kind)
    one, other = call(*qkv, p, 0.5, True), call(*qkv, p, 0.5, True)
    assert len(fake.compiled) == len(fake.started) == 1
    first, again = changed(fake, "compiled"), changed(fake, "started")
    assert first == again
    for seen, (out, lse) in ((fake.compiled[0], one), (fake.started[0], other)):
        assert (seen["Out"], seen["Lse"]) == (out.data_ptr(), lse.data_ptr())


def test_a_kept_launch_follows_the_tensors(kernel):
    fake, call = kernel
    p, one, other = plan(), draw(), draw()
    for qkv in (one, other, one):
        out, _ = call(*qkv, p, 0.5, False)
        seen = (fake.started or fake.compiled)[-1]
        assert seen["Out"] == out.data_ptr()
        held = [x[0] if isinstance(x, tuple) else x for x in list(seen.values())[1:8]]
        assert {x.data_ptr() for x in qkv} <= set(held)


def test_kinds_of_calls_do_not_mix(kernel):
    """Every order of two kinds of calls through one plan gives what a fresh plan would have been given."""
    fake, call = kernel
    calls = [
        lambda p: call(*held["tokens first"], p, 0.5, False),
        lambda p: call(*held["heads first"], p, 0.5, False),
        lambda p: call(*held["one projection"], p, 0.5, False),
        lambda p: call(*held["tokens first"], p, 0.25, False),
        lambda p: call(*held["tokens first"], p, 0.5, True),
        lambda p: call(*held["tokens first"], p, 0.5, True, init),
        lambda p: call(*held["tokens first"], p, 0.5, True, (init[0].float(), init[1])),
        lambda p: call(*half, p, 0.5, False),
    ]
    held = {kind: draw(kind) for kind in KINDS}
    half = draw(dtype=torch.float16)
    init = (held["heads first"][0].clone(), torch.zeros(1, 2, N))
    shared = plan()
    for one in calls:
        for two in calls:
            seen = []
            for p in (shared, plan()):
                one(p)
                fake.compiled.clear(), fake.started.clear()
                two(p)
                seen.append({n: x for n, x in (fake.compiled + fake.started)[-1].items() if n not in ("Out", "Lse")})
            ours, fresh = seen
            differ = {n for n in ours if ours[n] != fresh[n]}
            assert all(of_plan(n) for n in differ), differ


def test_a_new_plan_of_known_facts_compiles_nothing(kernel):
    fake, call = kernel
    qkv = draw()
    for _ in range(3):
        call(*qkv, plan(), 0.5, False)
    assert len(fake.compiled) == 1 and len(fake.started) == 2
    longer = draw(n=2 * N)
    call(*longer, plan(2 * N), 0.5, False)
    assert len(fake.compiled) == 1  # lengths are not specialised


@pytest.mark.parametrize("other", ["a dtype", "a bias", "a log-sum-exp", "unaligned queries"])
def test_other_facts_compile_another_kernel(kernel, other):
    fake, call = kernel
    call(*draw(), plan(), 0.5, False)
    q, k, v = draw(dtype=torch.float16 if other == "a dtype" else torch.bfloat16)
    if other == "unaligned queries":
        q = draw("shifted")[0]
    p = plan(key_bias=torch.zeros(1, 1, N)) if other == "a bias" else plan()
    call(q, k, v, p, 0.5, other == "a log-sum-exp")
    assert len(fake.compiled) == 2 and not fake.started


def test_unaligned_keys_are_copied_every_time(kernel):
    fake, call = kernel
    p, (q, k, v) = plan(), draw("shifted")
    for _ in range(2):
        call(q, k, v, p, 0.5, False)
        seen = (fake.compiled + fake.started)[-1]
        if "k_desc" in seen:
            assert seen["k_desc"][0] % 16 == 0 and seen["k_desc"][0] != k.data_ptr()
        else:
            assert seen["K"] == k.data_ptr()


def test_an_integer_of_64_bits_is_another_kind():
    facts = [launching.form(x) for x in (3, 2**31, 2**31 + 1, 1, 32)]
    assert len(set(facts)) == 5


# ---- the checks of a call, made once for every kind of call
def ask(p: BlockPlan, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return block_sparse_attention(q, k, v, p, **more)


def test_a_kind_of_call_is_checked_once(monkeypatch):
    asked = []
    real = api._admit
    monkeypatch.setattr(api, "_admit", lambda *args: asked.append(args) or real(*args))
    p = plan()
    for _ in range(3):
        ask(p, *draw(dtype=torch.float32))
    assert len(asked) == 1
    ask(p, *draw("heads first", dtype=torch.float32))
    ask(p, *draw(dtype=torch.float64))
    ask(p, *draw(dtype=torch.float32), options=KernelOptions(implementation="reference"))
    ask(p, *draw(dtype=torch.float32), scale=1e-9)  # not every implementation takes every scale
    assert len(asked) == 5


@pytest.mark.parametrize("wrong", ["length", "dtype of k", "heads", "init", "name"])
def test_what_is_wrong_is_said_also_after_a_call_that_was_right(wrong):
    p = plan()
    q, k, v = draw(dtype=torch.float32)
    ask(p, q, k, v)
    more: dict[str, Any] = {}
    if wrong == "length":
        q = q[:, :, 1:]
    if wrong == "dtype of k":
        k = k.double()
    if wrong == "heads":
        k, v = (x.repeat(1, 3, 1, 1) for x in (k, v))
    if wrong == "init":
        more["init"] = (q[:, :1], torch.zeros(1, 1, N))
    if wrong == "name":
        more["options"] = KernelOptions(implementation="hoper")
    for _ in range(2):
        with pytest.raises(ValueError):
            ask(p, q, k, v, **more)


def test_a_gradient_is_asked_for_by_the_call_and_not_by_the_kind_of_call():
    p = plan()
    q, k, v = draw(dtype=torch.float32)
    assert not ask(p, q, k, v).requires_grad
    assert ask(p, q.requires_grad_(), k, v).requires_grad
    with torch.no_grad():
        assert not ask(p, q, k, v).requires_grad
