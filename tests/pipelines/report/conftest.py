"""A run folder made up for the report: two studies, five methods, moving coloured squares, plans with frames as groups.

The numbers are plausible inventions; nothing here was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foveal.kernels.block_sparse import BlockPlan, Box
from foveal.plugins.plans.file import save_plan

METHODS = (
    # id, label, density, end to end, operator, psnr, noise of the pictures
    ("dense", "dense", 1.0, 1.0, 1.0, None, 0),
    ("grat-b1", "GRAT-B b=1", 0.18, 1.42, 4.1, 21.3, 16),
    ("grat-b2", "GRAT-B b=2", 0.29, 1.31, 2.7, 24.2, 9),
    ("na-3", "neighbourhood 3x16x16", 0.18, 1.36, 3.6, 22.0, 14),
    ("na-5", "neighbourhood 5x16x16", 0.29, 1.22, 2.2, 24.9, 8),
)


def square_video(seed: int, noise: float, shape: tuple[int, int, int] = (16, 64, 64), method: int = 0) -> np.ndarray:
    """A bright square that moves over a striped ground. -> uint8 [T, H, W, 3]"""
    t, h, w = shape
    rng = np.random.default_rng(seed)
    hue, start, step = rng.integers(60, 255, 3), rng.integers(4, h // 3, 2), rng.uniform(0.3, 0.5, 2) * h / t
    ground = 24 + 10 * ((np.arange(w)[None, :] // 6 + np.zeros((h, 1), int)) % 2)
    video = np.repeat(ground[None, :, :, None], t, 0).repeat(3, -1).astype(float)
    side = h // 5
    for i in range(t):
        y, x = (start + step * i).astype(int) + (
            np.random.default_rng(method * 97 + i).integers(-1, 2, 2) if noise > 10 else 0
        )
        video[i, y : y + side, x : x + side] = hue
    grain = np.random.default_rng(1000 * seed + method).normal(0, 1, video.shape)
    return np.clip(video + grain * (1.5 + noise / 3), 0, 255).astype(np.uint8)


def frame_plan(grid: tuple[int, int, int], reach: int, partial: bool = False, text: int = 0) -> BlockPlan:
    """Each frame visits the frames within ``reach``; ``partial`` cuts the outer ones to a window."""
    t, h, w = grid
    n, size = h * w, t * h * w
    lists = [[c for c in range(t) if abs(c - r) < (reach if partial else reach + 1)] for r in range(t)]
    edges = [[c for c in range(t) if abs(c - r) == reach] if partial else [] for r in range(t)]
    tail = [t] if text else []
    full = [a + tail for a in lists]
    width = max(len(a) + len(b) for a, b in zip(full, edges, strict=True))
    index = [a + b + [0] * (width - len(a) - len(b)) for a, b in zip(full, edges, strict=True)] + [[0] * width] * len(
        tail
    )
    count = [len(a) + len(b) for a, b in zip(full, edges, strict=True)] + [0] * len(tail)
    n_full = [len(a) for a in full] + [0] * len(tail)
    starts = [r * n for r in range(t)] + [size] * len(tail)
    lengths = [n] * t + [text] * len(tail)
    as_int = lambda x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    return BlockPlan(
        n_queries=size + text, n_keys=size + text, q_start=as_int(starts), q_len=as_int(lengths),
        kv_start=as_int(starts), kv_len=as_int(lengths), count=as_int(count), n_full=as_int(n_full),
        index=as_int(index),
        dense_rows=((t, t + 1),) if text else (), box=_window(grid, text) if partial else None,
        label=f"frames within {reach}",
    )  # fmt: skip


def _window(grid: tuple[int, int, int], text: int) -> Box:
    """Keys within a quarter of the frame, in rows and columns."""
    t, h, w = grid
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    coord = torch.stack([y.flatten().repeat(t), x.flatten().repeat(t)])
    coord = torch.cat([coord, torch.zeros(2, text, dtype=coord.dtype)], 1).to(torch.int16)
    return Box(coord - h // 4, coord + h // 4 + 1, coord)


def metric(
    name: str, value: Any, higher: bool, family: str, spread: float | None = None, **more: Any
) -> dict[str, Any]:
    ci = None if spread is None or value is None else [value - spread, value + spread]
    return {
        "id": name, "family": family, "value": value, "ci95": ci, "n": 1 if ci is None else 32,
        "higher_is_better": higher, "noise_floor": more.get("floor"),
        "faithful": more.get("faithful", True), "per_sample": [value],
    }  # fmt: skip


def _metrics(psnr: float | None, spread: bool) -> list[dict[str, Any]]:
    loss = 0.0 if psnr is None else (26 - psnr) / 60
    wide = 1.4 if spread else None
    out = []
    if psnr is not None:
        out += [
            metric("psnr", psnr, True, "fidelity", wide, floor=58.2),
            metric("ssim", 0.72 + psnr / 120, True, "fidelity", 0.02 if spread else None, floor=0.9999),
            metric("step_rel_l1", 0.4 - psnr / 80, False, "fidelity", 0.01 if spread else None),
            metric("tdiff_psnr", psnr + 3.1, True, "fidelity", wide),
        ]
    out += [
        metric("world_psnr", 25.5 - 8 * loss, True, "video", 0.8 if spread else None),
        metric("jitter", 0.004 + 0.02 * loss, False, "video", 0.001 if spread else None),
        metric("acc_all", 0.94 - loss, True, "video", 0.06 if spread else None),
        metric("acc_motion", 0.97 - loss / 2, True, "video", 0.05 if spread else None),
        metric("midframe_smoothness", 0.98 - loss / 9, True, "video", faithful=False),
    ]
    return out


def _speed(density: float, e2e: float, operator: float) -> dict[str, Any]:
    attention = 5.4 / operator
    timing = lambda s: {"median_s": s, "iqr": 0.03 * s, "n": 3}  # noqa: E731
    return {
        "attention": timing(attention), "transformer": timing(10.6 / e2e), "end_to_end": timing(11.2 / e2e),
        "operator": {**timing(0.09 / operator), "ratio": operator, "efficiency": operator * density,
                     "includes": ["order", "plan", "kernel", "inverse"], "baseline": "sdpa flash"},
        "speedup": {"attention": operator, "transformer": 1 + 1.04 * (e2e - 1), "end_to_end": e2e,
                    "amdahl_bound": 1.93, "amdahl_at_density": 1 / (1 - 0.482 + 0.482 * density)},
    }  # fmt: skip


def _method(row: tuple, spread: bool, speed: bool, layers: int, steps: int) -> dict[str, Any]:  # type: ignore[type-arg]
    name, label, density, e2e, operator, psnr, _ = row
    rng = np.random.default_rng(len(label))
    times = (5.4 / operator / layers / steps * rng.uniform(0.85, 1.25, (layers, steps))).round(6).tolist()
    return {
        "id": name, "name": name.split("-")[0], "label": label, "config": {"method": name.split("-")[0], "b": 1},
        **({"speed": _speed(density, e2e, operator), "time_by_layer_step": times} if speed else {}),
        "density": {"mean": density, "visited": min(1.0, density * 1.1), "per_layer": [density] * layers,
                    "by_layer_step": [[1.0 if s == 0 and name == "na-5" else density] * steps for s in range(layers)]},
        "implementation": "sdpa" if name == "dense" else "torch",
        "ran_dense": [{"reason": "dense_layers", "count": 8, "layers": [0]}] if name == "na-5" else [],
        "metrics": _metrics(psnr, spread),
    }  # fmt: skip


def study(
    name: str, title: str, spread: bool, speed: bool, grid: tuple[int, int, int], prompts: list[str], seeds: list[int]
) -> dict[str, Any]:
    layers, steps = (8, 8) if speed else (6, 8)
    return {
        "id": name, "title": title, "note": "One prompt and one seed, so there are no intervals." if not spread else "",
        "model": {"id": name, "sha256": "0" * 64, "tokens": int(np.prod(grid)), "grid": list(grid), "frames": grid[0],
                  "size": 64, "steps": steps, "guidance": 1.0, "dtype": "float32", "params": 4_350_000,
                  "layers": layers, "heads": 3, "head_dim": 64, "toy": True,
                  "note": "trained on a synthetic world of moving shapes"},
        "design": {"prompts": prompts, "seeds": seeds, "base_seed": 0, "dense_steps": 0, "paired": True},
        "methods": [_method(row, spread, speed, layers, steps) for row in METHODS],
        "skipped": [{"id": "lpips_alex", "reason": "its weights are not on this machine"}],
        **({"amdahl": {"attention_share": 0.482, "bound": 1.93}} if speed else {}),
    }  # fmt: skip


def fabricate(folder: Path, media: bool = True, plans: bool = True) -> dict[str, Any]:
    """Write the run folder. Returns the document, so that a test can change it and write it again."""
    asked = [
        "a large orange ring moving down-right on a navy striped background",
        "a small cyan cross standing still on a gray plain background",
    ]
    document = {
        "schema": 1, "foveal": "0.1.0", "command": "foveal demo", "date": "2026-01-02T03:04:05Z",
        "title": "foveal demo",
        "host": {"cpu": "A Processor 9000", "gpu": None, "torch": "2.13.0", "threads": 2, "python": "3.11.9",
                 "triton": "3.6.0", "diffusers": "0.42.1", "platform": "Linux x86_64"},
        "studies": [
            study("world-video", "Speed and fidelity, one prompt", False, True, (16, 16, 16), asked[:1], [0]),
            study("world-nano", "Quality, 2 prompts x 2 seeds", True, False, (8, 8, 8), asked, [0, 1]),
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("title: foveal demo\nstudies:\n- id: world-video\n", encoding="utf-8")
    for entry, shape in zip(document["studies"], ((16, 64, 64), (8, 32, 32)), strict=True):
        home = folder / entry["id"]
        for number, row in enumerate(METHODS):
            if media:
                _write_media(home / "media" / row[0], entry, row[6], shape, number)
            if plans and row[0] != "dense":
                _write_plan(home / "plans" / f"{row[0]}.safetensors", tuple(entry["model"]["grid"]), row[0])
    write(folder, document)
    return document


def write(folder: Path, document: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(document), encoding="utf-8")


def _write_media(folder: Path, entry: dict[str, Any], noise: float, shape: tuple[int, int, int], number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for p in range(len(entry["design"]["prompts"])):
        for seed in entry["design"]["seeds"]:
            video = torch.from_numpy(square_video(10 * p + seed, noise, shape, number))
            save_file(
                {"video": video, "latents": torch.zeros(2, dtype=torch.bfloat16)}, folder / f"{p}-{seed}.safetensors"
            )


def _write_plan(path: Path, grid: tuple[int, int, int], name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    window, number = name.startswith("na"), int(name[-1])
    save_plan(path, frame_plan(grid, number // 2 if window else number, window), grid=grid)


@pytest.fixture(scope="session")
def fabricated() -> Callable[..., dict[str, Any]]:
    """The function that fabricates a run folder."""
    return fabricate


@pytest.fixture(scope="session")
def rewrite() -> Callable[[Path, dict[str, Any]], None]:
    """Write a changed document into a run folder."""
    return write


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., BlockPlan]:
    return frame_plan
