"""Teacher-forced step errors: the dense and the sparse network on the same x_t, step after step.

B samples, S steps.

Notable choices
- Run the dense trajectory once and keep what the network returned. Then sample again with the method attached, and after
  each forward hand the pipeline the dense answer instead of the method's: the trajectory stays the dense one, so x_t, the
  step, the guidance branch and the caches of a method are what they would be, and no error is amplified by chaos.
- Errors are weighted by the step length sigma[t] - sigma[t+1]; calls that belong to one step (guidance) are averaged.
- Works on the root network of any pipeline through two forward hooks; nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics.metric import FunctionMetric, Meta


@dataclass
class Trajectory:
    """What the dense network returned, call by call."""

    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class StepErrors:
    """Errors of each call of the sparse network against the dense one, each [rows] of the call's batch."""

    rel_l1: list[Tensor] = field(default_factory=list)
    cos: list[Tensor] = field(default_factory=list)

    def by_step(self, batch: int, steps: int, sigmas: Sequence[float] | None = None) -> dict[str, Tensor]:
        """-> {"rel_l1": [B, S], "cos": [B, S], "weight": [B, S] summing to 1 over steps}."""
        if not self.rel_l1 or len(self.rel_l1) % steps:
            raise UserError(f"{len(self.rel_l1)} network calls cannot be shared out over {steps} steps")
        calls = len(self.rel_l1) // steps

        def gather(values: list[Tensor]) -> Tensor:
            per_call = torch.stack([v.double().cpu().view(-1, batch).mean(0) for v in values])  # [S * calls, B]
            return per_call.view(steps, calls, batch).mean(1).T.contiguous()

        length = torch.ones(steps, dtype=torch.float64)
        if sigmas is not None and len(sigmas) == steps + 1:
            length = -torch.tensor(list(sigmas), dtype=torch.float64).diff()
        weight = (length / length.sum()).expand(batch, steps).contiguous()
        return {"rel_l1": gather(self.rel_l1), "cos": gather(self.cos), "weight": weight}


def rel_l1(value: Tensor, reference: Tensor) -> Tensor:
    """sum |v - v*| / sum |v*| of each row, [rows]."""
    difference = (value.float() - reference.float()).flatten(1).abs().sum(1)
    return difference / reference.float().flatten(1).abs().sum(1).clamp(min=1e-12)


def cosine(value: Tensor, reference: Tensor) -> Tensor:
    """Cosine of the flattened rows, [rows]."""
    return torch.cosine_similarity(value.float().flatten(1), reference.float().flatten(1), dim=1)


def first_tensor(output: Any) -> Tensor:
    """The prediction inside what a network returned: a tensor, a tuple, or an output object with `sample`."""
    if isinstance(output, Tensor):
        return output
    return first_tensor(output[0])


def with_first_tensor(output: Any, value: Tensor) -> Any:
    """The same kind of return value, with another prediction."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, (tuple, list)):
        return type(output)([value, *output[1:]])
    return type(output)(**{**output, next(iter(output)): value})


@contextmanager
def hooked(networks: Sequence[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """A forward hook on every network while the block runs."""
    handles = [network.register_forward_hook(hook) for network in networks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_trajectory(*networks: nn.Module) -> Iterator[Trajectory]:
    """Keep what the networks of a pipeline return, call by call, while the block runs."""
    trajectory = Trajectory()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        trajectory.outputs.append(first_tensor(output).detach().clone())

    with hooked(networks, hook):
        yield trajectory


@contextmanager
def follow_trajectory(trajectory: Trajectory, *networks: nn.Module) -> Iterator[StepErrors]:
    """Measure the networks against the recorded calls and feed the recorded answers to whoever calls them."""
    errors, calls = StepErrors(), iter(trajectory.outputs)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        reference = next(calls, None)
        value = first_tensor(output)
        if reference is None or reference.shape != value.shape:
            raise UserError(
                "the method's run calls the network differently from the dense run; steps and guidance must agree"
            )
        errors.rel_l1.append(rel_l1(value, reference))
        errors.cos.append(cosine(value, reference))
        return with_first_tensor(output, reference)

    with hooked(networks, hook):
        yield errors


def _weighted(key: str):
    def function(gen: Tensor, ref: Tensor | None, meta: Meta) -> Tensor:
        assert meta.steps is not None
        return (meta.steps[key] * meta.steps["weight"]).sum(1)

    return function


METRICS = (
    FunctionMetric(
        "step_rel_l1", "fidelity", False, _weighted("rel_l1"), "teacher-forced relative L1 of the velocity", ("trajectory",),
        settings={"weight": "sigma[t] - sigma[t+1]"},
    ),
    FunctionMetric(
        "step_cos", "fidelity", True, _weighted("cos"), "teacher-forced cosine of the velocity", ("trajectory",),
        settings={"weight": "sigma[t] - sigma[t+1]"},
    ),
)  # fmt: skip
