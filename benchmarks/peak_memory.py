"""Peak memory of an accelerated model against the same model dense: one layer and a few, random weights, sizes of published models.

``python benchmarks/peak_memory.py [--device cuda] [--out benchmarks/results/peak_memory.json] [--cases NAME ...] [--tiny]``

Accounting: ``peak_bytes`` is the highest level of memory during two forwards above the level with weights and inputs in place, so
it holds activations, temporaries, plans and whatever a method keeps. ``extra_bytes`` is that minus dense; ``qkv_bytes`` is one copy
of q, k and v of one layer. On a GPU the allocator counts; on a CPU, tensors that PyTorch operators make, and the bytes of plans.
``--tiny``: narrow models, short grids. A case that does not fit has null figures and says ``failed``.
"""

from __future__ import annotations

import argparse
import statistics
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import foveal
from foveal.pipelines.bench.rounds import Stopwatch, watched
from foveal.pipelines.bench.rows import write

Inputs = dict[str, Tensor]
Knobs = dict[str, Any]
METHODS: dict[str, Knobs] = {"dense": {}, "grat": {"density": 0.25}, "neighborhood": {"density": 0.25}}
TINY: Knobs = {"grid": (3, 24, 32), "heads": 2, "head_dim": 16}


# ---- memory
class LiveBytes(TorchDispatchMode):
    """Bytes of living tensors that operators made since it began, and their peak. Storage that existed before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._born(x.untyped_storage())
        return out

    def _born(self, storage: Any) -> None:
        name, size = id(storage), storage.nbytes()
        if name in self.storages:
            return

        def gone(_: Any) -> None:
            if self.storages.pop(name, None) is not None:
                self.live -= size

        self.storages[name] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def plan_bytes(handle: Any) -> int:
    """Bytes of the plans that a handle's layers ran, with the forms that kernels derived from them; shared tensors once."""
    plans = [row.facts.plan for row in handle.record.layers if row.facts is not None]
    tensors = [x for plan in plans for x in _tensors(plan)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [x for f in fields(value) for x in _tensors(getattr(value, f.name))]
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def peak_of(forward: Callable[[], Any], device: torch.device) -> int:
    """Peak above the resting level over two forwards; the first one makes plans."""
    if device.type != "cuda":
        with LiveBytes() as watch:
            forward()
            forward()
        return watch.peak
    torch.cuda.empty_cache()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    forward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - resting


def times_of(forward: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Milliseconds of some forwards."""
    watch = Stopwatch(device)
    for _ in range(rounds):
        with watched(watch):
            forward()
    return watch.times()


# ---- models
@dataclass(frozen=True)
class Case:
    """One model at one size: its token grid, heads x head_dim, text tokens, how it is built and called."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    text: int
    text_joins: bool
    model: Callable[[Case, int, bool], Any]
    inputs: Callable[[Case, nn.Module], Inputs]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text * self.text_joins


def wan(case: Case, layers: int, tiny: bool) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=case.heads, attention_head_dim=case.head_dim, num_layers=layers, ffn_dim=128 if tiny else 8960,
        text_dim=32 if tiny else 4096, freq_dim=256,
    )  # fmt: skip


def wan_inputs(case: Case, model: Any) -> Inputs:
    t, h, w = case.grid
    latent, text = (1, 16, t, 2 * h, 2 * w), (1, case.text, model.config.text_dim)
    return {"hidden_states": noise(*latent), "timestep": torch.tensor([500.0]), "encoder_hidden_states": noise(*text)}


def hunyuan(case: Case, layers: int, tiny: bool) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    single = layers // 2
    return HunyuanVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=case.heads, attention_head_dim=case.head_dim,
        num_layers=layers - single, num_single_layers=single, num_refiner_layers=1, text_embed_dim=32 if tiny else 4096,
        pooled_projection_dim=768, rope_axes_dim=axes(case.head_dim), guidance_embeds=True,
    )  # fmt: skip


def hunyuan_inputs(case: Case, model: Any) -> Inputs:
    t, h, w = case.grid
    return {
        "hidden_states": noise(1, 16, t, 2 * h, 2 * w), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, case.text, model.config.text_embed_dim),
        "encoder_attention_mask": lead(case.text, 60), "pooled_projections": noise(1, 768), "guidance": torch.tensor([6000.0]),
    }  # fmt: skip


def hunyuan15(case: Case, layers: int, tiny: bool) -> Any:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        num_attention_heads=case.heads, attention_head_dim=case.head_dim, num_layers=layers, num_refiner_layers=1,
        text_embed_dim=32 if tiny else 3584, text_embed_2_dim=1472, image_embed_dim=1152, rope_axes_dim=axes(case.head_dim),
    )  # fmt: skip


def hunyuan15_inputs(case: Case, model: Any) -> Inputs:
    image, glyphs = case.text * 729 // 1985, case.text * 256 // 1985
    prompt = case.text - image - glyphs
    return {
        "hidden_states": noise(1, 65, *case.grid), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, prompt, model.config.text_embed_dim), "encoder_attention_mask": lead(prompt, 60),
        "encoder_hidden_states_2": noise(1, glyphs, 1472), "encoder_attention_mask_2": lead(glyphs, 0),
        "image_embeds": torch.zeros(1, image, 1152),
    }  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def lead(length: int, valid: int) -> Tensor:
    """A mask [1, length] whose first ``valid`` tokens are real."""
    return (torch.arange(length) < valid).float()[None]


def axes(head_dim: int) -> tuple[int, int, int]:
    """RoPE's share of the head dim per axis: 16, 56, 56 of 128."""
    side = head_dim * 7 // 32 * 2
    return head_dim - 2 * side, side, side


CASES = (
    Case("wan-1.3b-480p", (21, 30, 52), 12, 128, 512, False, wan, wan_inputs),
    Case("hunyuan-544p", (33, 34, 60), 24, 128, 256, True, hunyuan, hunyuan_inputs),
    Case("hunyuan-720p", (33, 45, 80), 24, 128, 256, True, hunyuan, hunyuan_inputs),
    Case("hunyuan-1.5-480p", (31, 30, 53), 16, 128, 1985, True, hunyuan15, hunyuan15_inputs),
    Case("hunyuan-1.5-720p", (31, 45, 80), 16, 128, 1985, True, hunyuan15, hunyuan15_inputs),
)


# ---- rows
def measure(
    case: Case, layers: int, device: torch.device, dtype: torch.dtype, rounds: int, small: bool
) -> list[dict[str, Any]]:
    """Dense first, then every method on the same weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = case.model(case, layers, small).to(dtype).eval()
    inputs = {k: x.to(device, dtype if x.is_floating_point() else None) for k, x in case.inputs(case, model).items()}
    rows = [row_of(case, layers, model, inputs, None, {}, rounds)]
    for method, knobs in METHODS.items():
        with foveal.accelerate(model, method, **knobs) as handle:
            rows.append(row_of(case, layers, model, inputs, handle, knobs, rounds))
    return [against(rows[0], row) for row in rows]


def row_of(
    case: Case, layers: int, model: nn.Module, inputs: Inputs, handle: Any, knobs: Knobs, rounds: int
) -> dict[str, Any]:
    x = inputs["hidden_states"]

    def forward() -> None:
        with torch.no_grad():
            model(**inputs, return_dict=False)

    row: dict[str, Any] = {
        "case": case.name, "op": "block" if layers == 1 else f"model of {layers} layers", "impl": "sdpa",
        "method": None if handle is None else handle.method.name, "setting": knobs,
        "shape": {"tokens": case.tokens, "heads": case.heads, "head_dim": case.head_dim, "batch": 1},
        "dtype": {"bfloat16": "bf16", "float32": "fp32"}[str(x.dtype)[6:]], "density": 1.0, "rel_l2": None,
        "rounds": rounds, "includes": ["order", "plan", "kernel", "inverse"], "qkv_bytes": 3 * case.tokens * case.heads * case.head_dim * x.element_size(),
    }  # fmt: skip
    try:
        peak = peak_of(forward, x.device)
        times = times_of(forward, x.device, rounds)
    except torch.cuda.OutOfMemoryError:
        return row | {"peak_bytes": None, "ms": None, "ms_min": None, "ms_max": None, "failed": "out of memory"}
    if handle is not None:
        names = {layer.facts.implementation for layer in handle.record.layers if layer.facts is not None}
        row |= {"impl": ", ".join(sorted(names)) or "sdpa", "density": handle.record.density()}
        peak += plan_bytes(handle) if x.device.type == "cpu" else 0
    return row | {"peak_bytes": peak, "ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}


def against(dense: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row with what it takes beyond dense, in bytes and in copies of q, k and v."""
    known = None not in (row["peak_bytes"], dense["peak_bytes"])
    extra = row["peak_bytes"] - dense["peak_bytes"] if known else None
    faster = dense["ms"] / row["ms"] if known else None
    return row | {
        "baseline": dense["impl"], "speedup": faster, "eff": faster * row["density"] if faster is not None else None,
        "extra_bytes": extra, "extra_copies": None if extra is None else extra / row["qkv_bytes"],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/peak_memory.json")
    parser.add_argument(
        "--cases", nargs="+", default=[case.name for case in CASES], choices=[case.name for case in CASES]
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rows = []
    for case in (c for c in CASES if c.name in given.cases):
        for layers in given.layers:
            found = measure(
                replace(case, **TINY, text=case.text // 8) if given.tiny else case,
                layers,
                device,
                dtype,
                given.rounds,
                given.tiny,
            )
            for row in found:
                copies = "-" if row["extra_copies"] is None else f"{row['extra_copies']:+.2f}"
                print(
                    f"{row['case']}, {row['op']}, {row['method'] or 'model alone'}: {row['peak_bytes']} bytes, {copies} copies of q, k, v"
                )
            rows += found
            write(given.out, "peak_memory", rows, device)
    return rows


if __name__ == "__main__":
    main()
