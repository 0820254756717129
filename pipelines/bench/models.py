"""Models of two blocks with random weights at the sizes of published ones, and their inputs: the cases of `bench layers`.

Letters: T, H, W the token grid.

Notable choices
- A model has one block of each kind it is made of (Wan: two of its only kind); ``depths`` says how many the real one has.
- All text is valid, so that a mask over it hides nothing.
- diffusers is imported when a model is built, not before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.plugins.methods.dense import Dense
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood

Grid = tuple[int, int, int]
Inputs = dict[str, Tensor]
METHODS = {"dense": Dense, "grat": GRAT, "neighborhood": Neighborhood}  # classes: names need an installed package
EXACT = ("timestep", "img_ids", "txt_ids", "guidance", "encoder_attention_mask")  # inputs that keep their dtype


class Rival(NamedTuple):
    """What runs in a model. method: None is the model alone. fused: queries and keys may be finished by our kernel; compiled: its blocks are."""

    method: str | None
    knobs: dict[str, Any]
    fused: bool = True
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model. tile: of both methods; depths: blocks of each kind in the real model; width: other widths than the real ones.

    compiler: backend of torch.compile for the compiled rows; None: there are none.
    """

    name: str
    family: str
    grid: Grid
    heads: int
    tile: Grid
    depths: tuple[int, ...]
    density: float = 0.25
    text: int = 512
    head_dim: int = 128
    ffn: int = 0
    compiler: str | None = None
    width: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def rivals(self) -> dict[str, Rival]:
        """Rivals of the dense model by the name of their row: two that skip nothing, the sparse ones, and compiled ones."""
        grat = Rival("grat", {"group": self.tile, "pattern": "auto", "density": self.density})
        neighborhood = Rival("neighborhood", {"tile": self.tile, "density": self.density})
        found = {
            "host": Rival("dense", {}),
            "full density": Rival("neighborhood", {"window": -1, "tile": self.tile}),
            "grat": grat,
            "grat, own norms": grat._replace(fused=False),
            "neighborhood": neighborhood,
        }
        if self.compiler is None:
            return found
        compiled = {"dense": Rival(None, {}), "grat": grat}  # compiling takes longer than all the rest
        return found | {f"{name}, compiled": rival._replace(compiled=True) for name, rival in compiled.items()}


CASES = (
    Case(name="wan-1.3b-480p", compiler="inductor", family="wan", grid=(21, 30, 52), heads=12, ffn=8960, depths=(30,), tile=(21, 3, 4)),
    Case(name="wan-14b-480p", family="wan", grid=(21, 30, 52), heads=40, ffn=13824, depths=(40,), tile=(21, 3, 4)),
    Case(name="flux-4096", compiler="inductor", family="flux", grid=(1, 256, 256), heads=24, depths=(19, 38), tile=(1, 16, 16)),
    Case(name="wan-14b-720p", family="wan", grid=(21, 45, 80), heads=40, ffn=13824, depths=(40,), tile=(7, 9, 4)),
    Case(name="hunyuan-720p", compiler="inductor", family="hunyuan", grid=(33, 45, 80), heads=24, text=256, depths=(20, 40), tile=(11, 9, 5)),
)  # fmt: skip
SMALL: dict[str, Any] = {"head_dim": 16, "heads": 2, "text": 8, "density": 0.5, "compiler": "aot_eager"}
TINY = (
    Case(
        name="tiny wan", family="wan", grid=(2, 8, 8), tile=(2, 4, 4), ffn=32, depths=(3,), width={"text_dim": 16}, **SMALL
    ),
    Case(
        name="tiny flux", family="flux", grid=(1, 16, 16), tile=(1, 4, 4), depths=(2, 3),
        width={"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}, **SMALL,
    ),
    Case(
        name="tiny hunyuan", family="hunyuan", grid=(2, 8, 8), tile=(2, 4, 4), depths=(2, 3),
        width={"text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6), "num_refiner_layers": 1}, **SMALL,
    ),
)  # fmt: skip


def build(case: Case) -> tuple[nn.Module, Inputs]:
    """The model of two blocks on the default device, in fp32, and its inputs."""
    import diffusers

    t, h, w = case.grid
    common = {"num_attention_heads": case.heads, "attention_head_dim": case.head_dim, "num_layers": 1, **case.width}
    draw = torch.randn
    if case.family == "wan":
        model: Any = diffusers.WanTransformer3DModel(**{**common, "num_layers": 2, "ffn_dim": case.ffn})
        text = draw(1, case.text, model.config.text_dim)
        return model, {
            "hidden_states": draw(1, 16, t, 2 * h, 2 * w), "timestep": torch.tensor([500]), "encoder_hidden_states": text,
        }  # fmt: skip
    if case.family == "flux":
        model = diffusers.FluxTransformer2DModel(num_single_layers=1, **common)
        return model, {
            "hidden_states": draw(1, h * w, 64), "encoder_hidden_states": draw(1, case.text, model.config.joint_attention_dim),
            "pooled_projections": draw(1, model.config.pooled_projection_dim), "timestep": torch.tensor([0.5]),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(h)), torch.arange(float(w))),
            "txt_ids": torch.zeros(case.text, 3),
        }  # fmt: skip
    model = diffusers.HunyuanVideoTransformer3DModel(num_single_layers=1, **common)
    return model, {
        "hidden_states": draw(1, 16, t, 2 * h, 2 * w), "timestep": torch.tensor([500]), "guidance": torch.tensor([6000.0]),
        "encoder_hidden_states": draw(1, case.text, model.config.text_embed_dim), "encoder_attention_mask": torch.ones(1, case.text),
        "pooled_projections": draw(1, model.config.pooled_projection_dim),
    }  # fmt: skip


def made(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """Model and inputs on the device, as a pipeline in that dtype would hold them."""
    torch.manual_seed(0)
    with torch.device(device):
        model, inputs = build(case)
    cast = {n: x if n in EXACT or not x.is_floating_point() else x.to(dtype) for n, x in inputs.items()}
    return as_loaded(model, dtype), cast


def as_loaded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as ``from_pretrained(torch_dtype=dtype)`` leaves it: some modules stay fp32."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not exact & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in the order they run."""
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for name in names for block in getattr(model, name, ())]
