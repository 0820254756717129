"""The record of what ran: per layer and per step, how often, how long, how densely, and what ran dense and why.

Letters: L layers, S steps.

* Nothing here waits for the device while the model runs: GPU times are event pairs and densities are counted when somebody reads.
* A plan is kept once for all calls that share its lists (a prompt length alone does not make another plan), and at most
  ``KEPT_PLANS`` of them: later ones count with the last one kept.
* Seconds are those of the attention core (order, plan, kernel, inverse: all between q, k, v and their output), on the host's clock
  on a CPU and on the device's otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, choose
from foveal.plugins.clock import Lap, Laps
from foveal.plugins.site import Site

KEPT_PLANS = 16


# ---- plans
class PlanFacts:
    """What there is to say about a plan, worked out when it is read."""

    def __init__(self, plan: BlockPlan, q: Tensor, k: Tensor | None = None) -> None:
        self.plan = plan
        self.implementation = choose(q, plan, k=k, v=k).name
        self._numbers: tuple[float, float] | None = None

    @property
    def density(self) -> float:
        return self._read()[0]

    @property
    def visited(self) -> float:
        return self._read()[1]

    def _read(self) -> tuple[float, float]:
        if self._numbers is None:
            self._numbers = (self.plan.density, self.plan.visited)
        return self._numbers


# ---- layers
@dataclass
class Cell:
    """One layer at one step: sparse calls by their plan, dense calls, laps."""

    sparse: Counter[PlanFacts | None] = field(default_factory=Counter)
    dense: int = 0
    laps: Laps = field(default_factory=Laps)

    @property
    def calls(self) -> int:
        return self.dense + sum(self.sparse.values())

    def mean(self, name: str) -> float:
        """Mean "density" or "visited" over the calls; dense calls count 1, a method without a plan counts nan."""
        values = [(n, np.nan if facts is None else getattr(facts, name)) for facts, n in self.sparse.items()]
        return float(sum(n * x for n, x in [*values, (self.dense, 1.0)] if n) / self.calls) if self.calls else np.nan


@dataclass
class LayerRecord:
    """One attention layer. ``left_alone`` says why it was never bound; ``facts`` are those of its last plan."""

    component: str
    name: str
    role: str
    layer: int
    method: str
    left_alone: str | None = None
    facts: PlanFacts | None = None
    cells: dict[int, Cell] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def qualified(self) -> str:
        return f"{self.component}.{self.name}" if self.component else self.name

    @property
    def calls(self) -> int:
        return sum(cell.calls for cell in self.cells.values())

    @property
    def dense_calls(self) -> int:
        return sum(cell.dense for cell in self.cells.values())

    def seconds(self) -> float:
        return sum(cell.laps.seconds() for cell in self.cells.values())

    def mean(self, name: str) -> float:
        """Mean density or visited share over all calls, the dense ones included."""
        return float(sum(c.calls * c.mean(name) for c in self.cells.values()) / self.calls) if self.calls else np.nan

    def reset(self) -> None:
        self.facts, self.cells, self.reasons = None, {}, Counter()


@dataclass(frozen=True)
class Capture:
    """q, k, v [B, H, N, D] of one call, copied, with its site."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor


class Record:
    """What ran since the last ``reset()``.

    timing     take times; False leaves all seconds at 0
    capture    (layer, step) pairs whose q, k, v are copied into ``captured``: for benchmarks, off (empty) by default
    """

    def __init__(self) -> None:
        self.timing = True
        self.capture: list[tuple[int, int]] = []
        self.captured: list[Capture] = []
        self.layers: list[LayerRecord] = []
        self.notes: list[str] = []
        self._forwards: dict[tuple[str, int], Laps] = {}
        self._facts: dict[tuple[Any, ...], PlanFacts] = {}

    # ---- written by the host
    def add_layer(self, component: str, name: str, role: str, layer: int, method: str) -> LayerRecord:
        self.layers.append(LayerRecord(component, name, role, layer, method))
        return self.layers[-1]

    def note(self, sentence: str) -> None:
        """Something worth saying once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def ran_sparse(
        self, row: LayerRecord, step: int, plan: BlockPlan | None, q: Tensor, lap: Lap, k: Tensor | None = None
    ) -> None:
        cell = row.cells.setdefault(step, Cell())
        row.facts = self._facts_of(plan, q, k) or row.facts
        cell.sparse[row.facts] += 1
        cell.laps.add(lap)

    def ran_dense(self, row: LayerRecord, step: int, reason: str, lap: Lap) -> None:
        cell = row.cells.setdefault(step, Cell())
        cell.dense += 1
        cell.laps.add(lap)
        row.reasons[reason] += 1

    def ran_forward(self, component: str, step: int, lap: Lap) -> None:
        """One call of a whole transformer."""
        self._forwards.setdefault((component, step), Laps()).add(lap)

    def wants(self, layer: int, step: int) -> bool:
        return bool(self.capture) and (layer, step) in self.capture

    def keep(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.captured.append(Capture(site, *(x.detach().clone() for x in (q, k, v))))

    def _facts_of(self, plan: BlockPlan | None, q: Tensor, k: Tensor | None) -> PlanFacts | None:
        if plan is None:
            return None
        key = (plan.index.data_ptr(), plan.index.shape, plan.n_queries, plan.n_keys, plan.ordered, q.dtype)
        if key not in self._facts:
            if len(self._facts) >= KEPT_PLANS:
                return None
            self._facts[key] = PlanFacts(plan, q, k)
        return self._facts[key]

    def reset(self) -> None:
        """Forget what ran; the layers and the settings stay."""
        self.captured, self._forwards, self._facts = [], {}, {}
        for row in self.layers:
            row.reset()

    # ---- read by anyone
    @property
    def steps(self) -> int:
        """One more than the last step that ran."""
        return 1 + max([s for row in self.layers for s in row.cells] + [s for _, s in self._forwards], default=-1)

    def attention_seconds(self) -> float:
        """Seconds in the attention cores of the bound layers."""
        return sum(row.seconds() for row in self.layers)

    def transformer_seconds(self) -> float:
        """Seconds in whole transformer calls, attention included; attention_seconds / this is Amdahl's share."""
        return sum(laps.seconds() for laps in self._forwards.values())

    def transformer_by_step(self) -> np.ndarray:
        """-> float64 [S] seconds"""
        out = np.zeros(self.steps)
        for (_, step), laps in self._forwards.items():
            out[step] += laps.seconds()
        return out

    def by_layer_step(self) -> dict[str, np.ndarray]:
        """-> "seconds", "calls", "density", "visited": float64 [L, S]; nan density where a layer did not run."""
        shape = (len(self.layers), self.steps)
        out = {
            name: np.full(shape, np.nan if name in ("density", "visited") else 0.0)
            for name in ("seconds", "calls", "density", "visited")
        }
        for i, row in enumerate(self.layers):
            for step, cell in row.cells.items():
                out["seconds"][i, step], out["calls"][i, step] = cell.laps.seconds(), cell.calls
                out["density"][i, step], out["visited"][i, step] = cell.mean("density"), cell.mean("visited")
        return out

    def density(self) -> float:
        """Mean density over all calls, the dense ones included."""
        return self._mean("density")

    def visited(self) -> float:
        return self._mean("visited")

    def _mean(self, name: str) -> float:
        rows = [(row.calls, row.mean(name)) for row in self.layers if row.calls]
        return float(sum(n * x for n, x in rows) / sum(n for n, _ in rows)) if rows else np.nan

    def implementations(self) -> list[str]:
        """Names of the kernel implementations that ran."""
        return sorted({facts.implementation for facts in self._facts.values()})

    def ran_dense_why(self) -> list[dict[str, Any]]:
        """[{"reason", "count", "layers": names}], most frequent first; layers never bound count 0."""
        count: Counter[str] = Counter()
        layers: dict[str, list[str]] = {}
        for row in self.layers:
            reasons: Iterable[tuple[str, int]] = [(row.left_alone, 0)] if row.left_alone else row.reasons.items()
            for reason, n in reasons:
                count[reason] += n
                layers.setdefault(reason, []).append(row.qualified)
        return [{"reason": reason, "count": n, "layers": layers[reason]} for reason, n in count.most_common()]

    def table(self) -> list[dict[str, Any]]:
        """One row a layer: name, role, method, implementation, plan, calls, dense_calls, density, visited, seconds, share."""
        whole = self.transformer_seconds()
        return [
            {
                "name": row.qualified, "role": row.role, "method": row.method,
                "implementation": row.facts.implementation if row.facts else None,
                "plan": str(row.facts.plan) if row.facts else None,
                "calls": row.calls, "dense_calls": row.dense_calls,
                "density": _number(row.mean("density")), "visited": _number(row.mean("visited")),
                "seconds": row.seconds(), "share": row.seconds() / whole if whole else None,
            }
            for row in self.layers
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything above as JSON-able data; nan becomes None."""
        grids = {name: [[_number(x) for x in row] for row in array] for name, array in self.by_layer_step().items()}
        return {
            "layers": self.table(), "by_layer_step": grids, "ran_dense": self.ran_dense_why(), "notes": list(self.notes),
            "attention_seconds": self.attention_seconds(), "transformer_seconds": self.transformer_seconds(),
            "transformer_by_step": self.transformer_by_step().tolist(), "steps": self.steps,
            "density": _number(self.density()), "visited": _number(self.visited()), "implementations": self.implementations(),
        }  # fmt: skip


def _number(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
