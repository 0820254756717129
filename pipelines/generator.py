"""A loaded model and one way to sample from it: shipped toy models and diffusers pipelines behind the same call.

B samples, T frames, H height, W width.

Notable choices
- Every sample has its own noise, drawn on the CPU from its own seed, so a batch of two equals two batches of one.
- A shipped name wins over a folder of the same name; anything that looks like a path is a path; owner/name is a hub.
- fp32 on a CPU and bf16 elsewhere unless the config says otherwise.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal.pipelines.emoji.generation import emoji_generator
from foveal.pipelines.emoji.loading import is_emoji
from foveal.pipelines.errors import UserError
from foveal.pipelines.lina.loading import is_lina
from foveal.pipelines.schema import StudyConfig
from foveal.plugins.accelerate import accelerate
from foveal.plugins.method import Method

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Clip:
    """frames: float32 [B, T, 3, H, W] in [0, 1] on the CPU; latents: the last point of the sampling path, [B, ...]."""

    frames: Tensor
    latents: Tensor | None


@dataclass(frozen=True)
class Generator:
    """A pipeline, its networks, the facts for the record, and how to sample."""

    pipe: Any
    facts: dict[str, Any]
    device: torch.device
    world: bool
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The denoisers of the pipeline, in the order they run."""
        names = ("transformer", "transformer_2", "unet")
        found = [getattr(self.pipe, name, None) for name in names]
        return tuple(module for module in found if isinstance(module, nn.Module))

    @property
    def steps(self) -> int:
        return int(self.facts["steps"])

    def sigmas(self) -> list[float] | None:
        """Noise levels of the last run, steps + 1 of them, if the scheduler keeps such a list."""
        values = getattr(self.pipe.scheduler, "sigmas", None)
        return None if values is None else torch.as_tensor(values).double().cpu().tolist()

    def copies(self, n: int) -> list[Generator] | None:
        """n generators that share nothing, this one first; None for checkpoints too large to copy."""
        if not self.world:
            return None
        return [self, *(replace(self, pipe=copy.deepcopy(self.pipe)) for _ in range(n - 1))]

    def attach(self, method: Method) -> Any:
        """A handle (a context manager) that lets a method take over the pipeline's attention."""
        return accelerate(self.pipe, method)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], on_step: OnStep | None = None, steps: int | None = None
    ) -> Clip:
        """One clip per (prompt, seed) pair. `steps` replaces the study's number (for warm-up)."""
        steps = steps or self.steps
        call = self._world if self.world else self._diffusers
        return call(list(prompts), list(seeds), on_step or (lambda: None), steps)

    def _world(self, prompts: list[str], seeds: list[int], on_step: OnStep, steps: int) -> Clip:
        def after(pipe: Any, step: int, timestep: Tensor, facts: dict[str, Any]) -> None:
            on_step()

        try:
            out = self.pipe(
                prompts,
                seeds,
                steps=steps,
                guidance=self.facts["guidance"],
                callback_on_step_end=after,
                **self.arguments,
            )
        except ValueError as err:
            raise UserError(str(err)) from err
        frames = out.frames if hasattr(out, "frames") else out.images[:, None]
        return Clip(frames.float().cpu(), out.latents.float().cpu())

    def _diffusers(self, prompts: list[str], seeds: list[int], on_step: OnStep, steps: int) -> Clip:
        last: dict[str, Tensor] = {}

        def after(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            last["latents"] = values["latents"]
            on_step()
            return values

        wanted = {
            "num_inference_steps": steps,
            "guidance_scale": self.facts["guidance"],
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "output_type": "pt",
            "callback_on_step_end": after,
            **self.arguments,
        }
        known = inspect.signature(self.pipe.__call__).parameters
        given = {k: v for k, v in wanted.items() if k in known and v is not None}
        out = self.pipe(prompts, **given)
        frames = out.frames if hasattr(out, "frames") else out.images
        frames = torch.as_tensor(frames).float().cpu()
        frames = frames[:, None] if frames.ndim == 4 else frames
        latents = last.get("latents")
        return Clip(frames.clamp(0, 1), None if latents is None else latents.float().cpu())


def device_of(name: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU. Raises for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or (device.index or 0) >= max(1, torch.cuda.device_count() if device.type == "cuda" else 1):
        raise UserError(f"device {name!r} is not available on this machine; use device=auto or device=cpu.")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is fp32 on a CPU and bf16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_generator(study: StudyConfig) -> Generator:
    """The model of a study, ready to sample. Raises UserError in one sentence for whatever is missing."""
    try:
        from foveal.pipelines import shipped
    except ImportError as err:
        raise UserError(f"running models needs diffusers ({err}); pip install 'foveal[diffusers]'.") from err
    device = device_of(study.device)
    dtype = dtype_of(study.dtype, device)
    path = Path(study.model).expanduser()
    if study.model in shipped.shipped() or is_world_folder(path):
        source = study.model if study.model in shipped.shipped() else path
        if is_lina(shipped.config_of(source)):
            from foveal.pipelines.lina.generation import lina_generator

            return lina_generator(study, source, device, dtype)
        if is_emoji(shipped.config_of(source)):
            return emoji_generator(study, source, device, dtype)
        return world_generator(study, source, device, dtype)
    return diffusers_generator(study, diffusers_source(study.model, shipped.shipped()), device, dtype)


def is_world_folder(path: Path) -> bool:
    """Whether a folder holds a model in the format of the shipped ones."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return "words" in config or is_lina(config)
    except (OSError, ValueError):
        return False


def world_generator(study: StudyConfig, source: str | Path, device: torch.device, dtype: torch.dtype) -> Generator:
    """A model of the procedural world, by shipped name or folder."""
    from foveal.pipelines import shipped
    from foveal.pipelines.world.models import token_grid
    from foveal.pipelines.world.vocabulary import parse

    if study.height != study.width:
        raise UserError(f"height is {study.height} and width {study.width}; models of the world make square clips.")
    try:
        for prompt in study.prompts:
            parse(prompt)
        pipe = shipped.load(source, device=device, dtype=dtype)
        pipe.check_prompts(study.prompts)
    except ImportError as err:
        raise UserError(f"running {study.model} needs diffusers ({err}); pip install 'foveal[diffusers]'.") from err
    except (ValueError, FileNotFoundError) as err:
        raise UserError(str(err)) from err
    pipe.set_progress_bar_config(disable=True)
    card = pipe.card
    frames, size = study.frames or card.frames, study.height or card.size
    grid = token_grid(pipe.transformer.config.patch_size, frames, size)
    facts = {
        "id": card.id, "sha256": card.sha256, "tokens": math.prod(grid), "grid": list(grid), "frames": frames, "size": size,
        "steps": study.sampler.steps or card.steps,
        "guidance": card.guidance if study.sampler.guidance is None else study.sampler.guidance,
        "dtype": str(dtype).removeprefix("torch."), "device": device.type, "params": card.params, "layers": card.layers,
        "heads": card.heads, "head_dim": card.head_dim, "toy": card.toy, "note": card.note,
        "objects": card.objects, "sizes": list(card.sizes),
    }  # fmt: skip
    return Generator(pipe, facts, device, world=True, arguments={"frames": frames, "size": size})


def diffusers_source(model: str, shipped: Sequence[str]) -> str:
    """The folder or hub name to load. Raises UserError that says what is missing."""
    path = Path(model).expanduser()
    if (path / "model_index.json").is_file():
        return str(path)
    if path.is_dir():
        raise UserError(
            f"model: {path} has no model_index.json; a pipeline in diffusers format has one beside its transformer/ and vae/ folders."
        )
    looks_like_path = model.startswith((".", "/", "~")) or len(path.parts) != 2
    if looks_like_path and ("/" in model or "\\" in model):
        raise UserError(
            f"model: there is no folder {path}; give the path of a checkpoint in diffusers format, for example "
            f"model=/path/to/checkpoint, or a shipped model ({', '.join(shipped)})."
        )
    if looks_like_path:
        near = difflib.get_close_matches(model, shipped, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"model: {model!r} is no shipped model{hint} and no folder; shipped are {', '.join(shipped)}.")
    return model


def diffusers_generator(study: StudyConfig, source: str, device: torch.device, dtype: torch.dtype) -> Generator:
    """Any text-to-image or text-to-video pipeline that diffusers can load."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as err:
        raise UserError(f"running {study.model} needs diffusers ({err}); pip install 'foveal[diffusers]'.") from err
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype).to(device)
    except (OSError, ValueError, ImportError) as err:
        raise UserError(
            f"model: {source} does not load as a diffusers pipeline ({' '.join(str(err).split())[:300]})."
        ) from err
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_frames": study.frames, "height": study.height, "width": study.width}
    known = inspect.signature(pipe.__call__).parameters

    def default(name: str, chosen: Any) -> Any:
        given = known[name].default if name in known else None
        return chosen if chosen is not None else None if given is inspect.Parameter.empty else given

    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if network is None:
        raise UserError(f"model: {source} has no transformer and no unet; there is no attention to work on.")
    facts = {
        "id": study.model, "sha256": identity(Path(source)), "tokens": None, "grid": None, "frames": study.frames,
        "size": study.height, "steps": default("num_inference_steps", study.sampler.steps),
        "guidance": default("guidance_scale", study.sampler.guidance), "dtype": str(dtype).removeprefix("torch."),
        "device": device.type, "params": sum(p.numel() for p in network.parameters()), "layers": None, "heads": None,
        "head_dim": None, "toy": False, "note": "",
    }  # fmt: skip
    return Generator(pipe, facts, device, world=False, arguments=arguments)


def identity(folder: Path) -> str | None:
    """A digest of a checkpoint's file names, sizes and small files (weights are too large to hash whole); None for a hub."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()
