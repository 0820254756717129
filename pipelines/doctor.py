"""`foveal doctor`: what is installed, what works on this machine, and why the rest does not.

Notable choices
- A kernel implementation "works" when a small call through it agrees with the reference here and now, not when it imports.
- Missing optional packages are reported, not held against the machine; a wrong file or a wrong kernel is.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.kernels.block_sparse.needs import IMPLEMENTATIONS, INTERPRETED
from foveal.pipelines.host_info import host_info, package_version

OPTIONAL = ("triton", "diffusers", "transformers", "accelerate", "timm", "xformers")


def diagnose() -> dict[str, Any]:
    """Everything the doctor looks at; "healthy" is False when something that is there does not work."""
    packages, kernels, models = package_rows(), kernel_rows(), model_rows()
    broken = (
        [row for row in packages if row["state"] in ("missing", "outside the supported range") and row["required"]]
        + [row for row in kernels if row["state"].startswith("wrong")]
        + [row for row in models if row["state"].startswith("damaged")]
    )
    return {
        "healthy": not broken, "host": host_info(), "triton_interpreter": INTERPRETED, "packages": packages, "kernels": kernels,
        "models": models,
    }  # fmt: skip


# ---- packages
def package_rows() -> list[dict[str, Any]]:
    """Installed versions against the ranges that foveal states."""
    rows = [
        {"name": "python", "version": sys.version.split()[0], "supported": ">=3.10", "required": True, "state": "ok"}
    ]
    try:
        from packaging.requirements import Requirement
    except ImportError:  # then versions are not judged
        return rows
    seen: dict[str, tuple[Any, bool]] = {}
    for text in declared():
        requirement = Requirement(text)
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.name == "foveal" or (optional and requirement.name not in OPTIONAL):
            continue
        if requirement.name not in seen or requirement.specifier:
            seen[requirement.name] = (requirement, seen.get(requirement.name, (None, not optional))[1])
    return rows + [package_row(requirement, required) for requirement, required in seen.values()]


def declared() -> list[str]:
    """The requirements in foveal's own metadata."""
    try:
        return requires("foveal") or []
    except PackageNotFoundError:
        return []


def package_row(requirement: Any, required: bool) -> dict[str, Any]:
    found = package_version(requirement.name)
    if found is None:
        state = "missing" if required else "not installed (optional)"
    else:
        state = "ok" if requirement.specifier.contains(found, prereleases=True) else "outside the supported range"
    return {
        "name": requirement.name, "version": found, "supported": str(requirement.specifier) or "any",
        "required": required, "state": state,
    }  # fmt: skip


# ---- kernels
def kernel_rows() -> list[dict[str, Any]]:
    """Each implementation on each device: works, wrong, or why it is not used."""
    rows = []
    for device in devices():
        for name, needs in IMPLEMENTATIONS.items():
            q = torch.randn(1, 2, 256, 64, device=device)
            why = needs.refusal(q)
            rows.append(
                {
                    "implementation": name,
                    "device": device,
                    "state": "not used here" if why else try_kernel(name, q),
                    "why": why or needs.note,
                }
            )
    return rows


def devices() -> list[str]:
    """The CPU, and the accelerator if there is one."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def try_kernel(name: str, q: torch.Tensor) -> str:
    """Run one small call and compare it with the reference."""
    from foveal.kernels.block_sparse import BlockPlan, KernelOptions, block_sparse_attention

    start = torch.arange(0, 256, 64, dtype=torch.int32)
    length = torch.full((4,), 64, dtype=torch.int32)
    index = torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3]], dtype=torch.int32)
    two = torch.full((4,), 2, dtype=torch.int32)
    plan = BlockPlan(
        n_queries=256,
        n_keys=256,
        q_start=start,
        q_len=length,
        kv_start=start,
        kv_len=length,
        count=two,
        n_full=two,
        index=index,
    ).to(q.device)
    try:
        got, wanted = (
            block_sparse_attention(q, q, q, plan, options=KernelOptions(implementation=which)).float()
            for which in (name, "reference")
        )
    except Exception as err:
        return f"wrong: {' '.join(str(err).split())[:120]}"
    return "works" if float((got - wanted).abs().max()) < 2e-2 else "wrong"


# ---- shipped files
def model_rows() -> list[dict[str, Any]]:
    """The shipped models: where their files are and whether they are the recorded ones."""
    from foveal.pipelines.shipped import cards

    rows = []
    for card in cards():
        files = json.loads((card.folder / "config.json").read_text(encoding="utf-8"))["files"]
        state = "ok"
        for name, facts in files.items():
            path = card.folder / name
            if not path.is_file():
                state = f"missing: {name}"
            elif hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
                state = f"damaged: {name} is not the recorded file"
        rows.append(
            {"id": card.id, "tokens": card.tokens, "params": card.params, "sha256": card.sha256, "state": state}
        )
    return rows


def print_diagnosis(found: dict[str, Any], console: Console) -> None:
    """The diagnosis as Markdown tables."""
    host = found["host"]
    console.print(
        f"{host['platform']}, {host['cpu']}, {host['threads']} threads, GPU: {host['gpu'] or 'none'}", markup=False
    )
    console.print(f"triton interpreter: {'on' if found['triton_interpreter'] else 'off'}\n", markup=False)
    heads = {
        "packages": ("name", "version", "supported", "state"),
        "kernels": ("implementation", "device", "state", "why"),
        "models": ("id", "tokens", "params", "state"),
    }
    for part, columns in heads.items():
        table = Table(box=box.MARKDOWN)
        for column in columns:
            table.add_column({"why": "note"}.get(column, column))
        for row in found[part]:
            table.add_row(*(Text(cell_text(row[c])) for c in columns))
        console.print(table)
        console.print()
    console.print(
        "Everything that is here works." if found["healthy"] else "Something is broken: see the state columns.",
        markup=False,
    )


def cell_text(value: Any) -> str:
    """A value as a cell: a dash for nothing, thousands separated."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
