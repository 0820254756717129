"""Laws of linear attention's calls like one before: kernels that get addresses alone, here run by Triton's interpreter."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from foveal.kernels.gated_linear import linear_attention, plain_call, plain_repeat
from foveal.kernels.gated_linear.plain import projected_linear_attention

H, D = 2, 24


class Compiled:
    """What Triton keeps of a kernel: it starts again on addresses. The types are those of its first call."""

    function = packed_metadata = None

    def __init__(self, kernel, tensors, log):
        self.kernel, self.dtypes, self.log = kernel, [x.dtype for x in tensors], log

    def run(self, x, y, z, stream, function, metadata, info, enter, leave, *args):
        self.log.append(self.kernel.arg_names[0])
        pointers, numbers = args[: len(self.dtypes)], args[len(self.dtypes) :]
        assert all(type(p) is int for p in pointers)
        memory = [(ctypes.c_char * 16).from_address(p) if p else (ctypes.c_char * 16)() for p in pointers]
        tensors = [torch.frombuffer(m, dtype=t, count=1) for m, t in zip(memory, self.dtypes, strict=True)]
        self.kernel[x, y, z](*tensors, *numbers)


class Compiling:
    """A kernel of Triton's interpreter that gives what a compiled one would."""

    def __init__(self, kernel, log):
        self.kernel, self.arg_names, self.log = kernel, kernel.arg_names, log

    def __getitem__(self, programs):
        def start(*args, num_warps, num_stages, **switches):
            tensors = [x for x in args if isinstance(x, Tensor)]
            self.kernel[programs](*args, **switches)
            return Compiled(self.kernel, tensors, self.log)

        return start


@pytest.fixture
def again(monkeypatch):
    """The kernels that were started on addresses, by their first argument."""
    log: list[str] = []
    for name in ("token_sums", "join_parts", "attend"):
        monkeypatch.setattr(plain_call, name, Compiling(getattr(plain_call, name), log))
    monkeypatch.setattr(plain_call, "stream_of", lambda device: 0)
    monkeypatch.setattr(plain_repeat, "KEPT_ON", ("cuda", "cpu"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    caches = (plain_repeat._place, plain_call.summing, plain_call.attending)
    for cache in caches:
        cache.cache_clear()
    yield log
    for cache in caches:
        cache.cache_clear()


def draw(seed: int, n: int = 70, gated: bool = True, added: int = 50) -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(seed)
    gates = [torch.rand(1, H, n, 1).half() + 0.5 if gated else None for _ in range(2)]
    last = torch.randn(2, added, H * D).half() if added else None
    return torch.randn(2, n, 3 * H * D).half(), {"key_gate": gates[0], "value_gate": gates[1], "added": last}


def heads_of(qkv: Tensor) -> Tensor:
    return qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)


def by_definition(qkv: Tensor, more: dict[str, Tensor | None], normalisation: str) -> Tensor:
    wide = {name: None if x is None else x.double() for name, x in more.items()}
    if wide["added"] is not None:
        wide["added"] = wide["added"].unflatten(-1, (H, D)).transpose(1, 2)
    out = linear_attention(*heads_of(qkv).double(), normalisation=normalisation, implementation="reference", **wide)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("normalisation", ["division", "subtraction"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("parts", [1, 3], ids=["one-part", "parts"])
def test_a_call_like_one_before_equals_the_definition(parts, gated, normalisation, again, monkeypatch):
    monkeypatch.setattr(plain_call, "PROGRAMS", parts * 2 * H)
    for seed in range(3):
        qkv, more = draw(seed, gated=gated, added=50 if gated else 0)
        out = projected_linear_attention(qkv, H, normalisation=normalisation, implementation="triton", **more)
        assert out.is_contiguous()
        torch.testing.assert_close(out, by_definition(qkv, more, normalisation).half(), atol=2e-3, rtol=2e-3)
    assert again == (["K", "Parts", "Q"] if parts > 1 else ["K", "Q"]) * 2


def test_views_of_a_projection_are_the_projection(again):
    for seed in range(2):
        qkv, more = draw(seed, added=0)
        out = linear_attention(*heads_of(qkv), implementation="triton", **more)
        whole = projected_linear_attention(qkv, H, implementation="triton", **more)
        assert torch.equal(out.transpose(1, 2).flatten(2), whole) and out.transpose(1, 2).is_contiguous()
    assert again.count("Q") == 3  # the first call of all compiled


@pytest.mark.parametrize(
    "other",
    [{"n": 69}, {"gated": False}, {"added": 49}, {"added": 0}],
    ids=["length", "gates", "shorter-addition", "no-addition"],
)
def test_calls_of_two_kinds_do_not_mix(other, again):
    for seed, settings in enumerate(({}, other) * 2):
        qkv, more = draw(seed, **settings)
        out = projected_linear_attention(qkv, H, implementation="triton", **more)
        torch.testing.assert_close(out, by_definition(qkv, more, "division").half(), atol=2e-3, rtol=2e-3)


def test_gradients_and_misfits_go_the_long_way(again):
    qkv, more = draw(0)
    for _ in range(2):
        out = projected_linear_attention(qkv.requires_grad_(), H, implementation="triton", **more)
        assert out.requires_grad
    assert not plain_repeat._place.cache_info().currsize
    with pytest.raises(ValueError, match="key_gate has shape"):
        projected_linear_attention(qkv.detach(), H, key_gate=torch.ones(1, H, 3, 1).half())
    with pytest.raises(ValueError, match="added has shape"):
        projected_linear_attention(qkv.detach(), H, added=torch.ones(2, 71, H * D).half())


@pytest.mark.parametrize("heads", [1, 3, 16, 24, 67, 132, 192, 256])
def test_programs_of_the_sums_fill_the_multiprocessors(heads):
    programs = heads * plain_call.parts_of(heads)
    assert programs / (math.ceil(programs / plain_call.PROGRAMS) * plain_call.PROGRAMS) > 0.85
