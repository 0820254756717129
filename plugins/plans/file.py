"""Plans in files: one safetensors file holds every tensor of a plan, its header everything else as JSON.

* Loading checks every value again, so a file that was damaged or edited is refused in one sentence.
* ``info`` is plain data for the reader: grid, spans, method, whatever the writer adds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, Box, Proxies
from foveal.plugins.site import Span

FORMAT = "foveal.plan"
VERSION = 1
PLAIN = (
    "n_queries",
    "n_keys",
    "list_order",
    "ordered",
    "dense_rows",
    "pairs",
    "label",
    "max_q_len",
    "max_kv_len",
    "covers",
)
NESTED: dict[str, type] = {"box": Box, "proxies": Proxies}


class PlanFileError(ValueError):
    """A file that holds no plan that could be used, in one sentence."""


def save_plan(
    path: str | Path,
    plan: BlockPlan,
    *,
    grid: Sequence[int] | None = None,
    visual: Span | None = None,
    text: Span | None = None,
    **info: Any,
) -> None:
    """Write a plan; a file that is there is replaced whole or not at all.

    grid, visual, text   what the plan is for, kept for pictures and for ``info``; further keywords must be plain JSON data
    Raises ``PlanFileError`` where ``info`` is not plain data.
    """
    facts = {"grid": _plain(grid), "visual": _plain(visual), "text": _plain(text), **info}
    head = {
        "version": VERSION,
        "plan": {name: getattr(plan, name) for name in PLAIN},
        "info": {k: v for k, v in facts.items() if v is not None},
    }
    try:
        header = json.dumps(head)
    except TypeError as error:
        raise PlanFileError(f"the facts beside the plan must be plain data (numbers, text, lists): {error}.") from error
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in _tensors(plan).items()}
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    save_file(tensors, str(beside), metadata={FORMAT: header})
    os.replace(beside, path)


def load_plan(path: str | Path) -> tuple[BlockPlan, dict[str, Any]]:
    """-> (plan on the CPU, checked; info with ``grid``, ``visual``, ``text`` as tuples and spans where they were given).

    Raises ``PlanFileError`` in one sentence for a missing, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanFileError(f"there is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as opened:
            header = (opened.metadata() or {}).get(FORMAT)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PlanFileError(f"{path} is not a readable plan file ({error}).") from error
    if header is None:
        raise PlanFileError(f"{path} is a safetensors file but holds no plan; plan files carry a {FORMAT!r} header.")
    try:
        head = json.loads(header)
        if head["version"] != VERSION:
            raise PlanFileError(f"{path} has plan format {head['version']}; this version reads {VERSION}.")
        return _rebuild(head["plan"], tensors), _info(head["info"])
    except PlanFileError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise PlanFileError(f"{path} holds a damaged plan: {error}") from error


def _tensors(plan: BlockPlan) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif field.name in NESTED and value is not None:
            parts = {f"{field.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
            found |= {name: x for name, x in parts.items() if isinstance(x, Tensor)}
    return found


def _rebuild(plain: Mapping[str, Any], tensors: dict[str, Tensor]) -> BlockPlan:
    values: dict[str, Any] = {name: plain[name] for name in PLAIN}
    values["dense_rows"] = tuple(tuple(pair) for pair in values["dense_rows"])
    for outer, kind in NESTED.items():
        parts = {name.split(".", 1)[1]: tensors.pop(name) for name in list(tensors) if name.startswith(outer + ".")}
        if parts:
            values[outer] = kind(**parts)
    return BlockPlan(**{**values, **tensors})


def _info(info: dict[str, Any]) -> dict[str, Any]:
    out = dict(info)
    if "grid" in out:
        out["grid"] = tuple(out["grid"])
    for name in ("visual", "text"):
        if name in out:
            out[name] = Span(*out[name])
    return out


def _plain(value: Sequence[int] | None) -> list[int] | None:
    return None if value is None else [int(x) for x in value]
