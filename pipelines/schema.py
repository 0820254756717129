"""The schema of a run's YAML: plain data, nothing that names code.

Notable choices
- A file describes one study, or several under `studies:` (the demo does); the same fields either way.
- `None` means "the model's own value": steps, guidance, size and frames come from the model's card or pipeline.
- Everything is checked before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035  OmegaConf reads these annotations at run time

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_METRICS = ("psnr", "ssim", "tdiff_psnr", "vbench.temporal_flickering")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A method of the comparison.

    name   as `foveal methods` lists it
    label  how tables and plots call it (default: name and changed knobs)
    knobs  the method's own settings
    """

    name: str
    label: Optional[str] = None  # noqa: UP045
    knobs: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Sampling: number of steps and guidance scale; more steps cost time in proportion, guidance above 1 doubles it."""

    steps: Optional[int] = None  # noqa: UP045
    guidance: Optional[float] = None  # noqa: UP045


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One model, some methods, every prompt with every seed.

    model          name of a shipped model, a folder that holds a diffusers pipeline, or owner/name of a hub
    methods        what is compared; dense is added where a metric or a speed-up needs it
    prompts, seeds every method runs on every pair
    densities      compare only: each sparse method once per density
    sampler        steps and guidance
    frames, height, width   override the model's size
    metrics        ids, as `foveal methods --metrics` lists them
    device         "auto", "cpu", "cuda", "cuda:0", "mps"; dtype: "auto" (fp32 on CPU, bf16 elsewhere), "float32", ...
    rounds         timed repetitions of the first sample, interleaved over methods; 0 measures no speed
    operator_rounds  timed repetitions of one attention call on captured q, k, v; 0 leaves it out
    batch          samples generated together
    intervals      95 % intervals by resampling prompts (needs two prompts)
    step_samples   samples with teacher-forced step errors when step_rel_l1 or step_cos is asked for
    noise_floor_samples   samples run twice, dense against dense, for the numerical noise floor
    on_missing     "error" or "skip": what to do when a metric cannot be computed
    """

    model: str
    methods: List[MethodConfig]  # noqa: UP006
    prompts: List[str]  # noqa: UP006
    id: str = "study"
    title: str = ""
    note: str = ""
    seeds: List[int] = field(default_factory=lambda: [0])  # noqa: UP006
    densities: List[float] = field(default_factory=list)  # noqa: UP006
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    frames: Optional[int] = None  # noqa: UP045
    height: Optional[int] = None  # noqa: UP045
    width: Optional[int] = None  # noqa: UP045
    metrics: List[str] = field(default_factory=lambda: list(DEFAULT_METRICS))  # noqa: UP006
    device: str = "auto"
    dtype: str = "auto"
    rounds: int = 1
    operator_rounds: int = 10
    batch: int = 1
    intervals: bool = True
    step_samples: int = 4
    noise_floor_samples: int = 1
    on_missing: str = "error"


@dataclass(frozen=True, kw_only=True)
class RunConfig(StudyConfig):
    """A file with one study."""

    output: str = "runs/foveal"


@dataclass(frozen=True, kw_only=True)
class StudiesConfig:
    """A file with several studies; each has its own folder inside the output."""

    studies: List[StudyConfig]  # noqa: UP006
    output: str = "runs/foveal"
    title: str = ""


@dataclass(frozen=True)
class Experiment:
    """What the engine runs: one or more studies and the folder that takes their results.

    source: how the user names this config, for messages. single: results lie in the folder itself, not in one per study.
    """

    studies: tuple[StudyConfig, ...]
    output: str
    single: bool
    resolved: dict[str, Any]
    source: str = ""
    overrides: tuple[str, ...] = ()
