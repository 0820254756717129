"""What a metric is: an id, a family, what it needs, and a function from videos to one number per sample.

B samples, T frames, H height, W width.

Notable choices
- Videos are float32 in [0, 1], [B, T, 3, H, W]; an image has T = 1.
- Every metric gives one number per sample first; means, intervals and tests come later, in `foveal.pipelines.statistics`.
- An official name is used only with the official network and pre-processing; anything else has `faithful = False` and a
  name of its own. Nothing is downloaded and nothing is replaced silently.
- A number that does not exist for a sample (no seams in a tile that covers the frame) is NaN, with the reason beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from foveal.pipelines.errors import UserError

Family = Literal["fidelity", "attention", "distribution", "video"]
Input = Literal[
    "reference", "latents", "prompts", "tile", "trajectory", "world", "emoji", "lina"
]  # world: videos of the procedural world; emoji: images of the emoji world; lina: pictures of a LINA with a judge


@dataclass(frozen=True)
class WeightSpec:
    """A weight file a metric needs: where it comes from, what it is, what it unlocks."""

    name: str
    kind: Literal["pypi", "shipped", "local"]
    filename: str
    title: str
    sha256: str | None = None
    licence: str = ""


class MetricWeightsMissing(UserError):
    """A metric was asked for and its weights are nowhere to be found."""

    def __init__(self, metric: str, spec: WeightSpec, searched: tuple[str, ...] = (), stand_in: str | None = None):
        places = ", ".join(searched) or "no place (no path was given)"
        other = f" Without weights, ask for {stand_in!r} instead." if stand_in else ""
        super().__init__(
            f"metric {metric!r} needs {spec.filename} ({spec.title}); looked in {places}. Set `weights.{spec.name}` in the "
            f"config or put the file in the folder that FOVEAL_WEIGHTS_DIR names.{other}"
        )


@dataclass(frozen=True)
class Meta:
    """What a metric may know beside the videos. Absent parts are None.

    prompts: B texts. latents, ref_latents: final latents [B, ...] of the run and of the dense run.
    tile: edge lengths (frames, height, width) of one attention tile, in frames and pixels.
    steps: per-step errors of a teacher-forced pass, {"rel_l1" | "cos" | "weight": [B, S]}.
    reading: what the world reader saw in these videos, so that several metrics need not read them again.
    """

    prompts: tuple[str, ...] | None = None
    latents: Tensor | None = None
    ref_latents: Tensor | None = None
    tile: tuple[int, int, int] | None = None
    steps: dict[str, Tensor] | None = None
    reading: Any = None


@runtime_checkable
class Metric(Protocol):
    """One number per sample. Families: fidelity (to the dense run), video (no reference), attention, distribution."""

    @property
    def id(self) -> str: ...
    @property
    def family(self) -> Family: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def inputs(self) -> tuple[Input, ...]: ...
    @property
    def needs(self) -> tuple[WeightSpec, ...]: ...
    @property
    def faithful(self) -> bool: ...
    def per_sample(self, gen: Tensor, ref: Tensor | None = None, meta: Meta | None = None) -> Tensor:
        """-> [B] float; NaN where the number does not exist."""
        ...


@dataclass(frozen=True)
class FunctionMetric:
    """A metric made of one function (gen, ref, meta) -> [B]."""

    id: str
    family: Family
    higher_is_better: bool
    function: Callable[[Tensor, Tensor | None, Meta], Tensor]
    summary: str
    inputs: tuple[Input, ...] = ()
    needs: tuple[WeightSpec, ...] = ()
    faithful: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    proportion: bool = False  # each sample is right (1) or wrong (0): Wilson and McNemar apply

    def per_sample(self, gen: Tensor, ref: Tensor | None = None, meta: Meta | None = None) -> Tensor:
        """One number per sample, [B], after checking that what the metric needs is there."""
        meta = meta or Meta()
        check_video(self.id, gen)
        if "reference" in self.inputs:
            check_reference(self.id, gen, ref)
        for name, value in (("prompts", meta.prompts), ("latents", meta.latents), ("trajectory", meta.steps)):
            if name in self.inputs and value is None:
                raise UserError(f"metric {self.id!r} needs {name}, which this call does not give")
        return self.function(gen, ref, meta)


def check_video(metric: str, video: Tensor) -> None:
    """Raise unless `video` is float [B, T, 3, H, W]."""
    if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
        raise UserError(
            f"metric {metric!r} takes float videos in [0, 1] shaped [B, T, 3, H, W]; got {video.dtype} {tuple(video.shape)}"
        )


def check_reference(metric: str, gen: Tensor, ref: Tensor | None) -> None:
    """Raise unless there is a reference of the same shape."""
    if ref is None:
        raise UserError(f"metric {metric!r} compares with the dense run; give the dense videos as `ref`")
    if ref.shape != gen.shape:
        raise UserError(
            f"metric {metric!r} got {tuple(gen.shape)} and a reference {tuple(ref.shape)}; shapes must agree"
        )


def to_bytes(video: Tensor) -> Tensor:
    """The 8-bit view of a video, kept in float: round(255 x), clamped to 0..255."""
    return (video * 255).round().clamp(0, 255)


def luma(video: Tensor) -> Tensor:
    """ITU-R BT.601 luma, [B, T, 3, H, W] -> [B, T, H, W]."""
    weight = video.new_tensor([0.299, 0.587, 0.114])
    return (video * weight.view(1, 1, 3, 1, 1)).sum(2)
