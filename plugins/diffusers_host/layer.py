"""One bound attention layer: where the call is (its site), what the method does with it, and the dense way out.

Letters: B batch, H heads, N query tokens, M key tokens, D head dim. diffusers' layout is [B, N, H, D].

* A call that is made for the method alone (see fused.py) may be handed back; calls like it are then left to the model for the run.
* A call that cannot be placed for certain runs dense, and the record names why: never a wrong picture.
* State lives per (layer, branch) and per run. Inside a backward pass (gradient checkpointing recomputes there) the method gets a
  copy, so that recomputing changes nothing, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.plugins.clock import start_clock, stop_clock
from foveal.plugins.diffusers_host.grid import UNKNOWN, Layout
from foveal.plugins.diffusers_host.root_hook import Frame
from foveal.plugins.in_graphs import ticket_of
from foveal.plugins.layout import Layout as SequenceLayout
from foveal.plugins.method import Method
from foveal.plugins.order import Order, by
from foveal.plugins.record import LayerRecord, Record
from foveal.plugins.running import NOTHING_LEFT_OUT, Result, run_method
from foveal.plugins.site import Grid, MethodError, Site, Span, State

Dense = Callable[["Core"], Tensor]


class Core(NamedTuple):
    """Arguments of one attention call: q [B, N, H, D], k, v [B, M, Hkv, D]. ordered: their visual tokens are in the method's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    gqa: bool = False
    causal: bool = False
    dropout: float = 0.0
    ordered: bool = False


@dataclass(eq=False)
class Layer:
    """One attention layer of an accelerated model."""

    name: str
    role: str
    index: int
    layers: int
    method: Method
    frame: Frame
    record: Record
    row: LayerRecord
    dense: Dense
    local: Layout | None = None  # the layout of this level of a UNet
    local_ordered: bool = False  # the level's tokens are in the method's order
    states: dict[str | None, State] = field(default_factory=dict)
    seen: bool = False
    unfused: bool = False  # its queries and keys are left to the model until the run ends
    handed_back: Result | None = None  # what attend_sparse leaves to the next attend
    returned: set[tuple[int, Grid | None]] = field(
        default_factory=set
    )  # tokens and grids of calls handed back in this run

    def __post_init__(self) -> None:
        self.layer_id = torch.tensor(self.index)
        self.ticket = ticket_of(self)

    def new_run(self) -> None:
        """Forget what belongs to a run."""
        self.states.clear()
        self.returned.clear()
        self.unfused = False

    def attend(self, core: Core) -> Tensor:
        """-> [B, N, H, D]"""
        out = self._run(core, self.dense)
        assert out is not None
        return out

    def attend_sparse(self, core: Core) -> Tensor | None:
        """-> [B, N, H, D], or None where the method hands the call back: the next ``attend`` runs it dense and records it."""
        return self._run(core, None)

    def foresees(self, core: Core) -> Site | None:
        """The site of a call that the method will take, as far as shapes tell. Asked before there are queries and keys."""
        site = self.place(core) if self.frame.active else None
        if not isinstance(site, Site) or self.method.stands_aside(site) is not None:
            return None
        return None if self._kind(core) in self.returned else site

    def _kind(self, core: Core) -> tuple[int, Grid | None]:
        return core.q.shape[1], self.frame.layout.grid

    def _run(self, core: Core, dense: Dense | None) -> Tensor | None:
        self.seen = True
        recomputing = torch._C._current_graph_task_id() != -1
        timing = self.record.timing and not recomputing
        mark = start_clock(core.q.device) if timing else None
        result, self.handed_back = self.handed_back or self._result(core, recomputing), None
        if result.out is None and dense is None:
            self.handed_back = result
            self.returned.add(self._kind(core))
            return None
        if result.out is None:
            assert dense is not None
            out = dense(core)
        else:
            out = result.out.transpose(1, 2)
            self.returned.discard(self._kind(core))
        if not recomputing:
            self._write(core, result, stop_clock(mark))
        return out

    def _result(self, core: Core, recomputing: bool) -> Result:
        site = self.place(core) if self.frame.active or recomputing else "attention outside a call of the whole model"
        return Result(None, reason=site) if isinstance(site, str) else self._try_method(core, site, recomputing)

    def _try_method(self, core: Core, site: Site, recomputing: bool) -> Result:
        q, k, v = (x.transpose(1, 2) for x in core[:3])
        if self.record.wants(self.index, site.step) and not recomputing:
            self.record.keep(site, q, k, v)
        state = self.states.setdefault(site.branch, State())
        state = State(dict(state.values)) if recomputing else state
        if self.local is None:
            return run_method(self.method, q, k, v, site, state)
        return run_on_level(self.method, q, k, v, site, state)

    def _write(self, core: Core, result: Result, lap: Any) -> None:
        if result.out is None:
            self.record.ran_dense(self.row, self.frame.step, result.reason, lap)
        else:
            self.record.ran_sparse(
                self.row, self.frame.step, result.plan, core.q.transpose(1, 2), lap, core.k.transpose(1, 2)
            )

    def place(self, core: Core) -> Site | str:
        """The site of a call, or why it has none."""
        frame, n = self.frame, core.q.shape[1]
        layout = frame.layout if self.local is None else self.local
        if core.causal:
            return "causal attention"
        if core.dropout:
            return "attention dropout"
        if layout.grid is None:
            return layout.reason or UNKNOWN
        if core.k.shape[1] != n:
            return "queries and keys are not the same tokens"
        text = _text_tokens(layout, self.role, n)
        if text is None:
            return "the sequence does not fit the token grid"
        valid = frame.valid_text if text and self.local is None else None
        if valid is not None and valid.shape[0] != core.q.shape[0]:
            return "text lengths of another batch"
        if core.mask is not None and (valid is None or not _is_tail_padding(core.mask, n)):
            return "an attention mask beyond padding of the text"
        return self._site(layout, text, valid, core)

    def _site(self, layout: Layout, text: int, valid: Tensor | None, core: Core) -> Site:
        frame, start = self.frame, text if layout.text_first else 0
        visual = Span(start, start + layout.visual)
        extra = Span(visual.stop, visual.stop + layout.extra)
        span = Span(0, text) if layout.text_first else Span(extra.stop, extra.stop + text)
        assert layout.grid is not None
        return Site(
            role=self.role, name=self.name, layer=self.index, layers=self.layers, grid=layout.grid, visual=visual,
            step=frame.step, steps=frame.steps, branch=frame.branch, text=span if text else None, valid_text=valid,
            extra=(extra,) if layout.extra else (), scale=core.scale, layer_id=self.layer_id,
            ordered=core.ordered or (frame.ordered if self.local is None else self.local_ordered),
        )  # fmt: skip


def _text_tokens(layout: Layout, role: str, n: int) -> int | None:
    """Text tokens in a sequence of n, or None when it cannot be this grid's sequence."""
    text = n - layout.visual - layout.extra
    if role != "joint":
        return 0 if text == 0 else None
    return text if text >= 0 and layout.text in (None, text) else None


def _is_tail_padding(mask: Tensor, n: int) -> bool:
    """A key mask [B, 1, 1, N]. Its values are the text lengths that the frame knows already."""
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:] == (1, 1, n)


def order_on_level(method: Method, grid: Grid) -> Order | None:
    """The order of one level of a UNet; None where its settings leave nothing out there: such levels keep the plain UNet's bits."""
    tokens = grid[0] * grid[1] * grid[2]
    if tokens < method.min_tokens:
        return None
    try:
        order, static_plan = method.order(grid), getattr(method, "static_plan", None)
        if order is None or static_plan is None:
            return order
        planned = static_plan(SequenceLayout(grid, Span(0, tokens), ordered=True))  # what the level's calls will use
    except MethodError:
        return None
    return None if planned.plan.pairs == tokens * tokens else order


def run_on_level(method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site, state: State) -> Result:
    """One method on one level of a UNet. Knobs are chosen for the large levels: one that they do not fit runs dense, by name."""
    where = f" (level {by(site.grid[1:])})"
    try:
        result = run_method(method, q, k, v, site, state)
    except MethodError as error:
        return Result(None, reason=str(error).rstrip(".") + where)
    too_small = result.reason == NOTHING_LEFT_OUT or site.tokens < method.min_tokens
    return result._replace(reason=result.reason + where) if too_small else result
