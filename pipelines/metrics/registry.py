"""All metrics by id, and the choice of them for a run.

Notable choices
- A metric that is asked for and cannot be computed is an error before anything is generated, unless the run says
  `on_missing: skip`; then the report shows the row as not computed, with the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics import emoji, fidelity, lina, seam, ssim, teacher_forced, temporal, world
from foveal.pipelines.metrics.metric import FunctionMetric


@lru_cache(maxsize=1)
def metrics() -> dict[str, FunctionMetric]:
    """Every metric there is, id -> metric, in the order of the report."""
    groups = (fidelity.METRICS, ssim.METRICS, seam.METRICS, teacher_forced.METRICS, temporal.METRICS, world.METRICS)
    known = {metric.id: metric for group in groups for metric in group}
    return known | {metric.id: metric for metric in (*emoji.METRICS, *lina.METRICS) if metric.id not in known}


def metric(name: str) -> FunctionMetric:
    """The metric called `name`; an unknown name is an error that suggests the nearest one."""
    known = metrics()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"there is no metric called {name!r}{hint}; known are {', '.join(known)}.")


def choose(
    names: Iterable[str], world_model: bool, emoji_model: bool = False, lina_model: bool = False
) -> tuple[list[FunctionMetric], list[dict[str, str]]]:
    """The metrics of a run -> (computable ones, [{"id", "reason"}] for the rest).

    World metrics read videos of the shipped procedural world, emoji metrics images of the emoji world; on any other model
    they do not apply. An id that both have (acc_all, acc_scene) is answered by the model's own reader.
    """
    chosen, skipped = [], []
    own = {found.id: found for found in (emoji.METRICS if emoji_model else ())}
    for name in names:
        found = own.get(name) or metric(name)
        if "world" in found.inputs and not world_model:
            skipped.append({"id": found.id, "reason": "reads only videos of the shipped procedural world"})
        elif "emoji" in found.inputs and not emoji_model:
            skipped.append({"id": found.id, "reason": "reads only images of the shipped emoji model"})
        elif "lina" in found.inputs and not lina_model:
            skipped.append(
                {"id": found.id, "reason": "reads only pictures of a LINA, with the judge that came with it"}
            )
        else:
            chosen.append(found)
    return chosen, skipped
