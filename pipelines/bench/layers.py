"""`bench layers`: transformer blocks of real sizes inside a diffusers model, dense against methods, host overhead included.

Letters: N tokens, T, H, W the grid.

Notable choices
- A model of few blocks and random weights is run whole. Blocks are timed by hooks around them; the rest of the call (embedding, root
  hook, token order, output) is the part paid once per model call. Together they give the speed-up of a model of full depth.
- The baseline runs the fastest SDPA backend of this machine; where all text is valid, its mask is taken away, as a caller could do.
- The bound is Amdahl's: attention is timed inside the dense block, and attention that cost nothing would leave the rest.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from foveal.pipelines.bench.rounds import Rounds, Stopwatch, Timing, orders
from foveal.pipelines.bench.rows import row
from foveal.plugins.accelerate import accelerate
from foveal.plugins.methods.dense import Dense
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood

Rows = list[dict[str, Any]]
Grid = tuple[int, int, int]
METHODS = {"dense": Dense, "grat": GRAT, "neighborhood": Neighborhood}  # classes: names need an installed package


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model. methods: (name, knobs); depth: blocks of the real model; tiny: another width for trying the harness."""

    name: str
    family: str
    grid: Grid
    heads: int
    depth: int
    text: int = 512
    head_dim: int = 128
    ffn: int = 0
    width: dict[str, Any] = field(default_factory=dict)
    methods: tuple[tuple[str, dict[str, Any]], ...]


def pair(group: tuple[int, int, int], density: float) -> tuple[tuple[str, dict[str, Any]], ...]:
    return ("grat", {"group": group, "pattern": "auto", "density": density}), (
        "neighborhood",
        {"tile": group, "density": density},
    )


CASES = (
    Case(
        name="wan-1.3b-480p",
        family="wan",
        grid=(21, 30, 52),
        heads=12,
        ffn=8960,
        depth=30,
        methods=pair((21, 3, 4), 0.25),
    ),
    Case(name="flux-4096", family="flux", grid=(1, 256, 256), heads=24, depth=57, methods=pair((1, 16, 16), 0.25)),
    Case(
        name="wan-14b-720p",
        family="wan",
        grid=(21, 45, 80),
        heads=40,
        ffn=13824,
        depth=40,
        methods=pair((7, 9, 4), 0.25),
    ),
    Case(
        name="hunyuan-720p",
        family="hunyuan",
        grid=(33, 45, 80),
        heads=24,
        text=256,
        depth=60,
        methods=pair((11, 9, 5), 0.25),
    ),
)
SMALL = {"head_dim": 16, "heads": 2, "text": 8, "depth": 3}
TINY = (
    Case(
        name="tiny wan",
        family="wan",
        grid=(2, 8, 8),
        ffn=32,
        methods=pair((2, 4, 4), 0.5),
        width={"text_dim": 16},
        **SMALL,
    ),
    Case(
        name="tiny flux",
        family="flux",
        grid=(1, 16, 16),
        methods=pair((1, 4, 4), 0.5),
        width={"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)},
        **SMALL,
    ),
    Case(
        name="tiny hunyuan",
        family="hunyuan",
        grid=(2, 8, 8),
        methods=pair((2, 4, 4), 0.5),
        width={"text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6), "num_refiner_layers": 1},
        **SMALL,
    ),
)


def build(case: Case) -> tuple[nn.Module, dict[str, Tensor], list[nn.Module]]:
    """A model of two blocks with random weights on the CPU, its inputs, and its blocks."""
    import diffusers

    t, h, w = case.grid
    common = {"num_attention_heads": case.heads, "attention_head_dim": case.head_dim, "num_layers": 1, **case.width}
    if case.family == "wan":
        model: Any = diffusers.WanTransformer3DModel(**{**common, "num_layers": 2, "ffn_dim": case.ffn})
        text = torch.randn(1, case.text, model.config.text_dim)
        inputs = {
            "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": text,
        }
        return model, inputs, list(model.blocks)
    if case.family == "flux":
        model = diffusers.FluxTransformer2DModel(num_single_layers=1, **common)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(h)), torch.arange(float(w)))
        inputs = {
            "hidden_states": torch.randn(1, h * w, 64), "encoder_hidden_states": torch.randn(1, case.text, model.config.joint_attention_dim),
            "pooled_projections": torch.randn(1, model.config.pooled_projection_dim), "timestep": torch.tensor([0.5]), "img_ids": ids,
            "txt_ids": torch.zeros(case.text, 3),
        }  # fmt: skip
    else:
        model = diffusers.HunyuanVideoTransformer3DModel(num_single_layers=1, **common)
        inputs = {
            "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w), "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, case.text, model.config.text_embed_dim), "encoder_attention_mask": torch.ones(1, case.text),
            "pooled_projections": torch.randn(1, model.config.pooled_projection_dim), "guidance": torch.tensor([6000.0]),
        }  # fmt: skip
    return model, inputs, [*model.transformer_blocks, *model.single_transformer_blocks]


def as_loaded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as ``from_pretrained(torch_dtype=dtype)`` leaves it: some modules stay fp32."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not exact & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


class WithoutMask(TorchFunctionMode):
    """Dense attention without a mask that hides nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs.pop("attn_mask", None)
        return func(*args, **kwargs)


class Competitor:
    """A copy of the model that shares its weights, with blocks timed, and a method in it or none."""

    def __init__(
        self,
        model: nn.Module,
        case: Case,
        method: tuple[str, dict[str, Any]] | None,
        unmasked: bool,
        device: torch.device,
    ) -> None:
        memo: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, memo)
        self.device, self.unmasked = device, unmasked
        blocks = [
            m
            for n, m in self.model.named_modules()
            if n.count(".") == 1 and n.split(".")[0] in ("blocks", "transformer_blocks", "single_transformer_blocks")
        ]
        self.blocks = Stopwatch(device)
        self.whole = Stopwatch(device)
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: self.blocks.start())
            block.register_forward_hook(lambda *_: self.blocks.stop())
        self.n_blocks = len(blocks)
        self.handle = accelerate(self.model, METHODS[method[0]], **method[1]) if method else None
        self.peak = 0

    def __call__(self, inputs: dict[str, Tensor]) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode(), WithoutMask() if self.unmasked else contextlib.nullcontext():
            self.whole.start()
            self.model(**inputs, return_dict=False)
            self.whole.stop()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()

    def forget(self) -> None:
        """Drop the times so far (warm-up)."""
        self.blocks.marks, self.whole.marks = [], []
        if self.handle is not None:
            self.handle.record.reset()

    def parts(self) -> tuple[list[float], list[float]]:
        """Milliseconds of one block, and of the rest of the call, per call."""
        spent, whole = self.blocks.times(), self.whole.times()
        inside = [sum(spent[i : i + self.n_blocks]) for i in range(0, len(spent), self.n_blocks)]
        return [x / self.n_blocks for x in inside], [a - b for a, b in zip(whole, inside, strict=True)]

    def attention_ms(self) -> float:
        """Milliseconds of one attention call."""
        assert self.handle is not None
        rows = [layer for layer in self.handle.record.layers if layer.calls]
        return 1e3 * sum(layer.seconds() for layer in rows) / sum(layer.calls for layer in rows)


def fastest_backend(model: Competitor, inputs: dict[str, Tensor], device: torch.device) -> list[SDPBackend]:
    """The fastest SDPA backend for this model, first; math behind it, for calls that the first cannot take."""
    if device.type != "cuda":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    found: dict[SDPBackend, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with (
            contextlib.suppress(RuntimeError),
            sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION], set_priority=True),
        ):
            model(inputs)
            model.forget()
            model(inputs)
            found[backend] = model.whole.times()[-1]
        model.forget()
    return [min(found, key=lambda b: found[b]), SDPBackend.EFFICIENT_ATTENTION]


@contextlib.contextmanager
def backend(order: Sequence[SDPBackend]) -> Iterator[None]:
    with sdpa_kernel(list(order), set_priority=True):
        yield


def competitors(model: nn.Module, case: Case, device: torch.device) -> dict[str, Competitor]:
    """The dense baseline first; `host` is the host with nothing skipped: method dense, every layer passed through."""
    masked = case.family == "hunyuan"
    make: Callable[[Any, bool], Competitor] = lambda method, unmasked: Competitor(model, case, method, unmasked, device)  # noqa: E731
    found = {"dense": make(None, masked), "host": make(("dense", {}), masked)}
    if masked:
        found["dense, masked"] = make(None, False)
    return found | {name: make((name, knobs), masked) for name, knobs in case.methods}


def measure_case(case: Case, device: torch.device, seconds: float) -> Rows:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model, inputs, _ = build(case)
    model = as_loaded(model, dtype)
    inputs = {
        n: x.to(
            device,
            dtype
            if x.is_floating_point()
            and n not in ("timestep", "img_ids", "txt_ids", "guidance", "encoder_attention_mask")
            else x.dtype,
        )
        for n, x in inputs.items()
    }
    rivals = competitors(model, case, device)
    order = fastest_backend(rivals["dense"], inputs, device)
    with backend(order):
        for rival in rivals.values():
            rival(inputs)
            rival(inputs)
            rival.forget()
        rivals["dense"](inputs)
        once = rivals["dense"].whole.times()[-1] * len(rivals)
        rivals["dense"].forget()
        rounds = int(min(20, max(3, seconds * 1e3 / once)))
        for names in orders(list(rivals), rounds):
            for name in names:
                rivals[name](inputs)
    return _rows(case, rivals, order[0].name, str(dtype)[6:])


def _rows(case: Case, rivals: dict[str, Competitor], sdpa: str, dtype: str) -> Rows:
    parts = {name: rival.parts() for name, rival in rivals.items()}
    rounds = Rounds({name: Timing(tuple(blocks)) for name, (blocks, _) in parts.items()})
    rest = {name: statistics.median(outside) for name, (_, outside) in parts.items()}
    block = {name: rounds.timings[name].ms for name in parts}
    attention = rivals["host"].attention_ms()
    deep = {name: case.depth * block[name] + rest[name] for name in parts}
    shape = {
        "tokens": case.grid[0] * case.grid[1] * case.grid[2],
        "text": case.text,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "batch": 1,
        "grid": list(case.grid),
    }
    found = []
    for name, rival in rivals.items():
        sparse = name in dict(case.methods)
        record = rival.handle.record if rival.handle is not None else None
        bound = [layer.facts for layer in record.layers if layer.facts] if record is not None and sparse else []
        facts: dict[str, Any] = {
            "shape": shape,
            "dtype": dtype,
            "includes": ["host", "plan", "order", "kernel", "rest of the block"],
        }
        facts |= {
            "call_ms": rest[name],
            "depth": case.depth,
            "model_speedup": deep["dense"] / deep[name],
            "sdpa": sdpa,
            "peak_bytes": rival.peak,
        }
        facts |= {
            "attention_ms": attention if not sparse else rival.attention_ms(),
            "attention_share": attention / block["dense"],
        }
        if sparse:
            density = statistics.mean(facts_of.density for facts_of in bound)
            left = block["dense"] - attention
            facts |= {
                "method": name,
                "density": density,
                "setting": bound[0].plan.label,
                "kernel": bound[0].implementation,
            }
            facts |= {"bound": block["dense"] / left, "bound_at_density": block["dense"] / (left + density * attention)}
        if name == "host":
            facts["overhead"] = block["host"] / block["dense"] - 1
        found.append(row(case.name, "block", name, rounds, "dense", **facts))
    return found


def line(r: dict[str, Any]) -> str:
    extra = (
        f"  bound x{r['bound']:.2f} (x{r['bound_at_density']:.2f} at this density)  {r['kernel']}  {r['setting']}"
        if r.get("bound")
        else ""
    )
    over = f"  overhead {r['overhead']:+.2%}" if "overhead" in r else ""
    return (
        f"{r['case']:15} {r['impl']:14} density {r['density']:.3f}  block {r['ms']:8.3f} ms  x{r['speedup']:.3f}  attention {r['attention_ms']:8.3f} ms  "
        f"once per call {r['call_ms']:7.3f} ms  model x{r['model_speedup']:.3f}  peak {r['peak_bytes'] / 2**30:.2f} GiB{over}{extra}"
    )


def measure(device: torch.device, seconds: float, tiny: bool = False, cases: list[str] | None = None) -> Iterator[Rows]:
    """The rows of every case, or of those named, case by case. seconds: of measuring per case."""
    known = TINY if tiny else CASES
    unknown = set(cases or ()) - {case.name for case in known}
    if unknown:
        raise ValueError(
            f"there is no case {', '.join(sorted(unknown))}; choose from {', '.join(case.name for case in known)}."
        )
    for case in known:
        if cases and case.name not in cases:
            continue
        yield measure_case(case, device, seconds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
