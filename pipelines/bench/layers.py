"""`bench layers`: transformer blocks of real sizes inside a diffusers model, dense against methods, host overhead included.

Notable choices
- A model of two blocks is called whole, through ``foveal.accelerate``. "ms" is one block; "call_ms" is what a call costs besides its
  blocks, the token order of the accelerated ones included; together they give the speed-up of a model of real depth.
- The baseline runs the fastest SDPA backend of this machine inside the block, on the length the model has: padding that would make
  cuDNN faster is possible around an operator (`bench kernels` has it), not inside an unmodified block.
- Two contenders skip nothing: "host" hands every call back to the model's own attention, "full density" plans all pairs, which comes to
  the same where all text is known to be valid. Their overhead is taken round by round, where drift cancels, with its quartiles.
- Rows called compiled have their blocks compiled, the dense model's too, and are compared with it.
- "own norms" is the method with norm and rotation of queries and keys left to the model; ``fused`` says whose they were.
- The bound is Amdahl's: attention is timed inside the dense block, and attention that cost nothing would leave the rest.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.pipelines.bench.contender import Contender
from foveal.pipelines.bench.models import CASES, TINY, Case, Inputs, Rival, made
from foveal.pipelines.bench.rounds import How, Rounds, Timing, how_many, orders, reason
from foveal.pipelines.bench.rows import SHORT, Rows, row
from foveal.plugins.diffusers_host.fused import ON

DENSE, NO_MASK_TAKEN, COMPILED = "dense", "dense, masked", "dense, compiled"
ALONE = Rival(None, {})
NOTHING_SKIPPED = ("host", "full density")
INCLUDES = ["host", "plan", "order", "kernel", "rest of the block"]
ON_GPU = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
FALLBACK = SDPBackend.EFFICIENT_ATTENTION  # for calls that the first choice cannot take


@contextlib.contextmanager
def backend(order: Sequence[SDPBackend]) -> Iterator[None]:
    with sdpa_kernel(list(order), set_priority=True):
        yield


def fastest_backend(dense: Contender, inputs: Inputs, device: torch.device) -> list[SDPBackend]:
    """The fastest SDPA backend for this model, then one for calls that it cannot take."""
    if device.type != "cuda":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    found: dict[SDPBackend, float] = {}
    for first in ON_GPU:
        with contextlib.suppress(RuntimeError), backend([first, FALLBACK]):
            dense(inputs)
            dense.forget()
            dense(inputs)
            found[first] = dense.whole.times()[-1]
        dense.forget()
    return [min(found, key=lambda b: found[b]), FALLBACK] if found else [FALLBACK]


# ---- contenders
class Field:
    """The contenders of a case; one that fails, at any point, leaves with its reason. outputs: of their first calls."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device = case, device
        self.failed: dict[str, str] = {}
        self.outputs: dict[str, Tensor] = {}
        self.alive: dict[str, Contender] = {}
        masked = case.family == "hunyuan"
        self.names = [DENSE, *case.rivals, *([NO_MASK_TAKEN] if masked else [])]
        try:
            model, self.inputs = made(case, device, dtype)
        except Exception as error:
            self.failed = dict.fromkeys(self.names, reason(error))
            return
        for name in self.names:
            try:
                unmasked = masked and name != NO_MASK_TAKEN
                rival = case.rivals.get(name, ALONE)
                self.alive[name] = Contender(model, rival, unmasked, device, case.depths, case.compiler)
            except Exception as error:
                self.leave(name, error)

    def leave(self, name: str, error: Exception) -> None:
        self.failed[name] = reason(error)
        self.alive.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def call(self, name: str) -> Tensor | None:
        try:
            return self.alive[name](self.inputs)
        except Exception as error:
            self.leave(name, error)
            return None

    def warm(self) -> float:
        """Two calls of everybody, the first one kept. -> milliseconds of a round"""
        cost = 0.0
        for name in list(self.alive):
            out = self.call(name)
            if out is not None and name in (DENSE, *NOTHING_SKIPPED):
                self.outputs[name] = out.float().cpu()
            if name in self.alive and self.call(name) is not None:
                cost += self.alive[name].whole.times()[-1]
                self.alive[name].forget()
        return cost

    def run(self, rounds: int) -> None:
        for names in orders(list(self.alive), rounds):
            for name in names:
                if name in self.alive:
                    self.call(name)


def measure_case(case: Case, how: How) -> Rows:
    torch.compiler.reset()  # graphs of other cases count against the limit of one function
    field = Field(case, how.device, how.dtype)
    if DENSE in field.alive:
        try:
            order = fastest_backend(field.alive[DENSE], field.inputs, how.device)
        except Exception as error:
            field.leave(DENSE, error)
    if DENSE not in field.alive:
        return unmeasured(case, field, SHORT[how.dtype])
    with backend(order):
        field.run(how_many(field.warm(), how.seconds, how.rounds))
    if DENSE not in field.alive:
        return unmeasured(case, field, SHORT[how.dtype])
    return rows_of(case, field, order[0].name, SHORT[how.dtype])


# ---- rows
def shape_of(case: Case) -> dict[str, Any]:
    return {
        "tokens": case.tokens, "text": case.text, "heads": case.heads, "head_dim": case.head_dim, "batch": 1, "grid": list(case.grid),
    }  # fmt: skip


def unmeasured(case: Case, field: Field, dtype: str) -> Rows:
    """Rows of a case whose dense model did not run: nothing to compare with."""
    for name in field.names:
        field.failed.setdefault(name, f"not measured, because dense failed ({field.failed[DENSE]})")
    rounds = Rounds({}, field.failed)
    facts: dict[str, Any] = {"shape": shape_of(case), "dtype": dtype, "includes": INCLUDES}
    return [row(case.name, "block", n, rounds, None, method=method_of(n), **facts) for n in field.names]


def method_of(name: str) -> str | None:
    """The method a row counts for; those that skip nothing are no method's figures."""
    method = name.split(",")[0]
    return method if method in ("grat", "neighborhood") else None


def baseline_of(name: str) -> str:
    """Compiled is compared with compiled."""
    return COMPILED if name.endswith(", compiled") else DENSE


def rows_of(case: Case, field: Field, sdpa: str, dtype: str) -> Rows:
    alive = field.alive
    for name in [n for n in alive if baseline_of(n) not in alive]:
        field.leave(name, RuntimeError(f"not measured, because {baseline_of(name)} failed"))
    rounds = Rounds({n: Timing(tuple(c.blocks_ms())) for n, c in alive.items()}, field.failed)
    models = Rounds({n: Timing(tuple(c.model_ms())) for n, c in alive.items()})
    attention = alive["host"].attention_ms() if "host" in alive else None
    found = []
    for name in field.names:
        facts: dict[str, Any] = {
            "shape": shape_of(case),
            "dtype": dtype,
            "includes": INCLUDES,
            "method": method_of(name),
        }
        base = baseline_of(name)
        if name in alive:
            facts |= call_facts(alive[name], models, name) | {"depth": sum(case.depths), "sdpa": sdpa}
            facts |= attention_facts(rounds.timings[base].ms, attention, alive[name], name)
        if name in alive and name in NOTHING_SKIPPED:
            facts |= overhead_facts(rounds, field, name)
        found.append(row(case.name, "block", name, rounds, base, **facts))
    return found


def call_facts(contender: Contender, models: Rounds, name: str) -> dict[str, Any]:
    """What belongs to the whole call. peak_bytes: the most that PyTorch held during a call, weights included; null on a CPU."""
    return {
        "call_ms": statistics.median(contender.rest_ms()), "host_ms": contender.host_ms(), "model_ms": models.timings[name].ms,
        "model_speedup": models.timings[baseline_of(name)].ms / models.timings[name].ms, "peak_bytes": contender.peak or None,
    }  # fmt: skip


def attention_facts(block: float, attention: float | None, contender: Contender, name: str) -> dict[str, Any]:
    """Attention's share of the dense block, and for what runs a kernel of ours also its plan and the bounds."""
    facts: dict[str, Any] = {
        "attention_ms": attention,
        "attention_share": None if attention is None else attention / block,
    }
    if contender.handle is None or name == "host":
        return facts
    plans = [layer.facts for layer in contender.handle.record.layers if layer.facts is not None]
    if not plans:
        return facts | {"ran_dense": contender.handle.record.notes or "the method stood aside everywhere"}
    density = statistics.mean(p.density for p in plans)
    facts |= {
        "attention_ms": contender.attention_ms(),
        "density": density,
        "visited": statistics.mean(p.visited for p in plans),
    }
    facts |= {"setting": plans[0].plan.label, "kernel": plans[0].implementation}
    facts["fused"] = f"{ON}." in contender.handle.record.notes
    if attention is not None:
        left = block - attention
        facts |= {"bound": block / left, "bound_at_density": block / (left + density * attention)}
    return facts


def overhead_facts(rounds: Rounds, field: Field, name: str) -> dict[str, Any]:
    """What skipping nothing costs: of a block, round by round, and how far the model's output moved (relative L2 to dense)."""
    middle, low, high = rounds.ratio(name, DENSE)
    true, out = field.outputs[DENSE], field.outputs[name]
    difference = float((out - true).norm() / true.norm())
    return {"overhead": middle - 1, "overhead_quartiles": [low - 1, high - 1], "difference": difference}


def line(r: dict[str, Any]) -> str:
    """One row as a line of text."""
    if r.get("failed"):
        return f"{r['case']:15} {r['impl']:22} failed: {r['failed']}"
    attention = "" if r["attention_ms"] is None else f"  attention {r['attention_ms']:8.3f} ms"
    peak = "" if r["peak_bytes"] is None else f"  peak {r['peak_bytes'] / 2**30:.2f} GiB"
    over = (
        f"  overhead {r['overhead']:+.2%} [{r['overhead_quartiles'][0]:+.2%}, {r['overhead_quartiles'][1]:+.2%}]"
        if "overhead" in r
        else ""
    )
    bound = (
        f"  bound x{r['bound']:.2f} (x{r['bound_at_density']:.2f} at this density)"
        if r["method"] and "bound" in r
        else ""
    )
    plan = f"  {r['kernel']}{', fused norms' if r['fused'] else ''}  {r['setting']}" if "kernel" in r else ""
    return (
        f"{r['case']:15} {r['impl']:22} density {r['density']:.3f}  block {r['ms']:8.3f} ms  x{r['speedup']:.3f}{attention}  "
        f"once per call {r['call_ms']:7.3f} ms  model x{r['model_speedup']:.3f}{peak}{over}{bound}{plan}"
    )  # fmt: skip


def measure(
    device: torch.device, seconds: float, tiny: bool = False, cases: Sequence[str] | None = None, rounds: int | None = None
) -> Iterator[Rows]:  # fmt: skip
    """The rows of every case, or of those named, case by case. seconds: of measuring per case."""
    known = {case.name: case for case in (TINY if tiny else CASES)}
    for name in cases or ():
        if name not in known:
            raise ValueError(f"there is no case {name}; choose from {', '.join(known)}.")
    for name, case in known.items():
        if cases and name not in cases:
            continue
        yield measure_case(case, How.on(device, seconds, rounds))
        if device.type == "cuda":
            torch.cuda.empty_cache()
