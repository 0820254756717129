"""Image models measured beside each other: built, called for inference or for one step of training, their memory taken.

Letters: B batch, S pixels a side.

Notable choices
- The first model of a case is the one that the others are compared with. Weights are random: time does not depend on them.
- All models of a case use the SDPA backend with which the first is fastest; the row names it.
- "compiled" compiles the blocks of every model, one after the other with the same code, which bounds the time it takes; stem and head
  stay eager.
- Inference holds weights and images in bf16 on a GPU. Training holds weights in fp32 under bf16 autocast, with AdamW.
- Peak memory is what a process with this model alone would hold: its weights, gradients and optimiser, and the most that a call adds.
- timm is needed when a model is built, not before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.pipelines.bench.rounds import Call, How, Rounds, Stopwatch, reason, watched
from foveal.pipelines.bench.rows import SHORT, Rows, row

CLASSES, PATCH = 1000, 16
ON_GPU = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
FALLBACK = SDPBackend.EFFICIENT_ATTENTION  # for calls that the first choice cannot take
ON_CPU = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One model of a case.

    model    its name in timm's registry
    label    its name in rows, default ``model``
    layer    one of our attention layers that takes the place of its own, by name, in a model with patches of 16 and a class token
    sized    it takes img_size (others take images of any size)
    knobs    for its constructor
    claimed  multiply-adds at 224 pixels that its paper publishes
    goal     throughput against the first model: what it should reach at least, and what is hoped for
    """

    model: str
    label: str = ""
    layer: str = ""
    sized: bool = True
    knobs: dict[str, Any] = field(default_factory=dict)
    goal: tuple[float, float] | None = None
    claimed: float | None = None

    @property
    def name(self) -> str:
        return self.label or self.model

    def build(self, size: int) -> nn.Module:
        """For images of that many pixels, on the default device, in fp32."""
        from foveal.vision.creating import attention_layers, create

        knobs = dict(self.knobs) | ({"img_size": size} if self.sized else {})
        if self.layer:
            knobs["attn_layer"] = attention_layers((size // PATCH) ** 2 + 1)[self.layer]
        return create(self.model, **knobs)


@dataclass(frozen=True, kw_only=True)
class ImageCase:
    """Models on one batch of images. size: S; batch: B; group: a name for several cases."""

    name: str
    group: str
    size: int
    batch: int
    entrants: tuple[Entrant, ...]
    training: bool = False
    compiled: bool = False

    @property
    def op(self) -> str:
        return "training_step" if self.training else "inference"


def compile_blocks(model: nn.Module) -> int:
    """Compile every block of a model where it stands. -> how many; ValueError where a model has no ``blocks``."""
    found = [m for name, m in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module called blocks to compile; measure it uncompiled.")
    for block in found:
        block.compile(dynamic=False)
    return len(found)


class Contestant:
    """A model with a batch of images: calling it is one inference or one step of training."""

    def __init__(self, entrant: Entrant, case: ImageCase, how: How) -> None:
        torch.manual_seed(0)
        self.case, self.how = case, how
        with how.device:
            self.model = entrant.build(case.size).train(case.training)
            self.images = torch.randn(case.batch, 3, case.size, case.size)
            self.labels = torch.randint(CLASSES, (case.batch,))
        if case.training:
            self.optimiser = torch.optim.AdamW(
                self.model.parameters(), lr=1e-6, fused=how.device.type == "cuda" or None
            )
        else:
            self.model.requires_grad_(False).to(how.dtype)
            self.images = self.images.to(how.dtype)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if case.compiled:
            compile_blocks(self.model)

    def __call__(self) -> Tensor:
        """-> logits, or the loss of the step."""
        if not self.case.training:
            with torch.no_grad():
                return self.model(self.images)
        half = self.how.device.type == "cuda"
        with torch.autocast(self.how.device.type, torch.bfloat16, enabled=half):
            logits = self.model(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def own_bytes(self) -> int:
        """Weights, what the optimiser keeps, and the images."""
        kept = [*self.model.parameters(), *self.model.buffers(), self.images, self.labels]
        if self.case.training:
            kept += [x for state in self.optimiser.state.values() for x in state.values() if torch.is_tensor(x)]
        return sum(x.numel() * x.element_size() for x in kept)

    def peak_bytes(self) -> int | None:
        """The most that one call holds; None off the GPU."""
        added = added_bytes(self, self.how.device)
        return None if added is None else added + self.own_bytes()


def added_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that a call holds above what was held before it; None off the GPU, where PyTorch does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def backend(order: Sequence[SDPBackend]) -> Iterator[None]:
    with sdpa_kernel(list(order), set_priority=True):
        yield


def fastest_backend(call: Contestant, device: torch.device) -> tuple[SDPBackend, ...]:
    """With which SDPA backend a model is fastest, then one for calls that it cannot take. Measured without compiling."""
    if device.type != "cuda":
        return ON_CPU
    found: dict[SDPBackend, float] = {}
    for first in ON_GPU:
        with contextlib.suppress(RuntimeError), backend((first, FALLBACK)):
            for _ in range(2):
                call()
            watch = Stopwatch(device)
            for _ in range(3):
                with watched(watch):
                    call()
            found[first] = min(watch.times())
    return (min(found, key=lambda b: found[b]), FALLBACK) if found else (FALLBACK,)


def contestants(case: ImageCase, how: How) -> tuple[dict[str, Contestant], dict[str, str]]:
    """-> those that could be built, and why the others could not."""
    built: dict[str, Contestant] = {}
    failed: dict[str, str] = {}
    for entrant in case.entrants:
        try:
            built[entrant.name] = Contestant(entrant, case, how)
        except Exception as error:
            failed[entrant.name] = reason(error)
    return built, failed


def choose_backend(case: ImageCase, how: How) -> tuple[SDPBackend, ...]:
    """Taken with an uncompiled copy of the first model, so that nothing is compiled twice."""
    from dataclasses import replace

    if how.device.type != "cuda":
        return ON_CPU
    return fastest_backend(Contestant(case.entrants[0], replace(case, compiled=False), how), how.device)


def image_rows(case: ImageCase, how: How) -> Rows:
    """All models of one case, one interleaved measurement."""
    if case.compiled:
        torch.compiler.reset()  # sizes of an earlier case would make this one's dynamic
    try:
        order = choose_backend(case, how)
    except Exception as error:
        order = (FALLBACK,) if how.device.type == "cuda" else ON_CPU
        print(f"{case.name}: no backend could be chosen ({reason(error)})", flush=True)
    with backend(order):
        built, failed = contestants(case, how)
        timed = how.time(dict(built))
        timed = Rounds(timed.timings, timed.failed | failed)
        peaks = {name: built[name].peak_bytes() for name in timed.timings}
    first = case.entrants[0].name
    baseline = first if first in timed.timings else None
    found = []
    for entrant in case.entrants:
        name = entrant.name
        facts: dict[str, Any] = {
            "shape": {"image": case.size, "batch": case.batch}, "dtype": SHORT[how.dtype], "compiled": case.compiled,
            "sdpa": order[0].name, "peak_bytes": peaks.get(name), "parameters": built[name].parameters if name in built else None,
            "includes": ["forward", "backward", "optimiser"] if case.training else ["model"], "goal": entrant.goal,
            "claimed": entrant.claimed,
        }  # fmt: skip
        if name in timed.timings:
            facts["images_per_s"] = 1e3 * case.batch / timed.timings[name].ms
        found.append(row(case.name, case.op, name, timed, baseline, **facts))
    return found


def line(r: dict[str, Any]) -> str:
    """One row as a line of text."""
    if r.get("failed"):
        return f"{r['case']:28} {r['impl']:28} failed: {r['failed']}"
    speed = "" if r.get("images_per_s") is None else f"  {r['images_per_s']:10,.0f} images/s"
    ratio = "" if r["speedup"] is None else f"  x{r['speedup']:.2f}"
    goal = "" if not r.get("goal") else f" (wanted {r['goal'][0]:g}, hoped {r['goal'][1]:g})"
    peak = "" if not r.get("peak_bytes") else f"  peak {r['peak_bytes'] / 2**30:.2f} GiB"
    cost = "" if not r.get("multiply_adds") else f"  {r['multiply_adds'] / 1e9:.2f} GMAC"
    size = "" if not r.get("parameters") else f"  {r['parameters'] / 1e6:.1f} M"
    return f"{r['case']:28} {r['impl']:28} {r['ms']:9.3f} ms{speed}{ratio}{goal}{peak}{size}{cost}"
