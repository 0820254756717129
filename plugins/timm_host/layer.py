"""One attention layer taken over: where the call is (its site), what the method does with it, and the dense way out.

Letters: B batch, H heads, N tokens (prefix first), D head dim.

* A call that cannot be placed for certain runs dense, and the record names why.
* Prefix tokens (class, distillation, register) see everything and are seen by everything: they are an extra span of the site.
* Every model call is a run of one step, so every attention call starts from an empty state: no picture sees another's.
* In a backward pass (gradient checkpointing recomputes there) nothing is kept and nothing is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.plugins.clock import start_clock, stop_clock
from foveal.plugins.in_graphs import ticket_of
from foveal.plugins.method import Method
from foveal.plugins.order import by
from foveal.plugins.record import LayerRecord, Record
from foveal.plugins.running import Result, run_method
from foveal.plugins.site import Site, Span, State
from foveal.plugins.timm_host.frame import CAUSAL, NO_CALL, Frame, Group
from foveal.plugins.timm_host.restated import Core, dense

if TYPE_CHECKING:
    from foveal.plugins.timm_host.root import Root

MISFIT = "the sequence does not fit the token grid"
MASK = "an attention mask"
DROPOUT = "attention dropout"


@dataclass(eq=False)
class Layer:
    """One attention layer of an accelerated model. fused: its dense way is PyTorch's own attention."""

    name: str
    index: int
    layers: int
    method: Method
    root: Root
    record: Record
    row: LayerRecord
    fused: bool
    role: str = "self"
    states: dict[str | None, State] = field(default_factory=dict)
    seen: bool = False

    def __post_init__(self) -> None:
        self.layer_id = torch.tensor(self.index)
        self.ticket = ticket_of(self)

    def attend(self, core: Core, traced: Frame | None = None) -> Tensor | None:
        """-> [B, H, N, D], or None where the module's own forward must do it. traced: the frame of a whole compiled model."""
        self.seen = True
        recomputing = torch._C._current_graph_task_id() != -1
        frame = traced or self.root.frame(recomputing)
        if traced is not None:
            self.root.note_compiled(traced)
        reason = self.refusal(core, frame)
        mark = start_clock(core.q.device) if self.record.timing and not recomputing else None
        if reason is not None:
            out = dense(core) if self.fused else None
            self._write(core, Result(None, reason=reason), mark, recomputing)
            return out
        assert frame is not None
        if frame.padded:
            return self._groups(core, frame, recomputing)
        result = self._ask(core, frame, frame.groups[0], recomputing)
        out = dense(core._replace(mask=None)) if result.out is None and self.fused else result.out
        self._write(core, result, mark, recomputing)
        return out

    def refusal(self, core: Core, frame: Frame | None) -> str | None:
        """Why a call has no site, or None."""
        if core.causal:
            return CAUSAL
        if core.dropout:
            return DROPOUT
        if frame is None or not frame.groups:
            return NO_CALL if frame is None else frame.reason
        tokens = [frame.prefix + group.grid[0] * group.grid[1] for group in frame.groups]
        if max(tokens) > core.q.shape[2] or (not frame.padded and tokens[0] != core.q.shape[2]):
            return MISFIT
        if core.mask is not None and not frame.masks_padding:
            return MASK
        return None

    def _groups(self, core: Core, frame: Frame, recomputing: bool) -> Tensor | None:
        """Samples of one grid at a time, on their real tokens; padding gives 0."""
        out, some = torch.zeros_like(core.q), False
        for group in frame.groups:
            n = frame.prefix + group.grid[0] * group.grid[1]
            q, k, v = (x[group.rows, :, :n] for x in core[:3])
            real = Core(q, k, v, scale=core.scale)
            mark = start_clock(core.q.device) if self.record.timing and not recomputing else None
            result = self._ask(real, frame, group, recomputing, by(group.grid))
            part = dense(real) if result.out is None else result.out
            out = out.index_put((group.rows,), torch.nn.functional.pad(part, (0, 0, 0, out.shape[2] - n)))
            self._write(real, result, mark, recomputing)
            some |= result.out is not None
        if some:
            return out
        return dense(core) if self.fused else None

    def _ask(self, core: Core, frame: Frame, group: Group, recomputing: bool, branch: str | None = None) -> Result:
        site = self.site(frame, group, core)
        if self.record.wants(self.index, 0) and not recomputing:
            self.record.keep(site, *core[:3])
        state = State()
        if not recomputing:
            self.states[branch] = state
        return run_method(self.method, *core[:3], site, state)

    def site(self, frame: Frame, group: Group, core: Core) -> Site:
        rows, columns = group.grid
        n = frame.prefix
        return Site(
            role=self.role, name=self.name, layer=self.index, layers=self.layers, grid=(1, rows, columns),
            visual=Span(n, n + rows * columns), extra=(Span(0, n),) if n else (), ordered=frame.order is not None,
            scale=core.scale, layer_id=self.layer_id,
        )  # fmt: skip

    def _write(self, core: Core, result: Result, mark: Any, recomputing: bool) -> None:
        if recomputing:
            return
        lap = stop_clock(mark)
        if result.out is None:
            self.record.ran_dense(self.row, 0, result.reason, lap)
        else:
            self.record.ran_sparse(self.row, 0, result.plan, core.q, lap, core.k)
