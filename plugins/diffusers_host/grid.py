"""The token grid of one model call, read from the arguments of the root forward.

Letters: B batch, C channels, N tokens, T, H, W the token grid (images have T = 1).

* Only shapes are read, except for image ids, whose rows and columns are looked at once per tensor (one wait for the device).
* Ids are trusted only if they are row-major and complete; everything doubtful is "no grid" with a reason, and runs dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.plugins.site import Grid

UNKNOWN = "the token grid of this model is unknown"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one model call lie.

    grid        of the tokens being generated, or None with a ``reason``
    text_first  joint attention puts text before the visual tokens
    text        text tokens in joint attention; None: not known before the call
    extra       visual tokens behind the grid: reference images, padding
    """

    grid: Grid | None
    text_first: bool = True
    text: int | None = None
    extra: int = 0
    reason: str | None = None

    @property
    def visual(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] if self.grid else 0


def nothing(reason: str = UNKNOWN) -> Layout:
    return Layout(None, reason=reason)


def find_layout(model: nn.Module, call: dict[str, Any]) -> Layout:
    """Layout of a model call from its bound arguments. Never raises for an odd call: no grid, and the reason."""
    finder = next((f for prefix, f in FINDERS if type(model).__name__.startswith(prefix)), None)
    if finder is None:
        return nothing()
    try:
        layout = finder(model, call)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return nothing("the arguments of this model call do not show its token grid")
    if layout.grid is not None and min(layout.grid) < 1:
        return nothing("the token grid is empty")
    return layout


def text_lengths(call: dict[str, Any]) -> Tensor | None:
    """Valid text tokens per sample, int32 [B] on the device, from ``encoder_attention_mask`` [B, N_text]; never waits."""
    mask = call.get("encoder_attention_mask")
    return mask.sum(dim=1, dtype=torch.int32) if isinstance(mask, Tensor) and mask.ndim == 2 else None


# ---- one finder per family
def _latent(model: nn.Module, x: Tensor, t_dim: int = 2) -> Grid:
    """[B, C, T, H, W] latents and the patch size -> grid."""
    config: Any = model.config
    patch, patch_t = config.patch_size, getattr(config, "patch_size_t", None) or 1
    t, h, w = patch if isinstance(patch, (tuple, list)) else (patch_t, patch, patch)
    return x.shape[t_dim] // t, x.shape[-2] // h, x.shape[-1] // w


def _wan(model: nn.Module, call: dict[str, Any]) -> Layout:
    return Layout(_latent(model, call["hidden_states"]), text=0)


def _hunyuan(model: nn.Module, call: dict[str, Any]) -> Layout:
    if "Framepack" in type(model).__name__:
        return nothing("FramePack mixes history tokens of several scales")
    if "15" in type(model).__name__:
        return nothing("HunyuanVideo 1.5 masks every pair of tokens")
    text = call["encoder_hidden_states"].shape[1]
    return Layout(_latent(model, call["hidden_states"]), text_first=False, text=text)


def _flux(model: nn.Module, call: dict[str, Any]) -> Layout:
    if call.get("kv_cache_mode"):
        return nothing("Flux2 puts reference tokens first in its KV cache modes")
    return ids_layout(call["img_ids"], call["encoder_hidden_states"].shape[1])


def ids_layout(ids: Tensor, text: int) -> Layout:
    """Image ids [N, 3] = (image, row, column) or [B, N, 4] -> layout. Image 0 is generated, later ones are references."""
    rows = (ids[0] if ids.ndim == 3 else ids).detach().cpu().long()
    main = rows[rows[:, 0] == 0]
    if not len(main):
        return nothing("the image ids hold no image being generated")
    h, w = int(main[:, 1].max()) + 1, int(main[:, 2].max()) + 1
    at = torch.arange(h * w)
    expected = torch.stack((at // w, at % w), dim=1)
    if len(main) != h * w or not torch.equal(rows[: h * w, 1:3], expected) or bool((rows[: h * w, 0] != 0).any()):
        return nothing("the image ids are not one row-major grid")
    return Layout((1, h, w), text=text, extra=len(rows) - h * w)


def _cogvideox(model: nn.Module, call: dict[str, Any]) -> Layout:
    x, config = call["hidden_states"], model.config  # [B, T, C, H, W]; T is rounded up to whole patches
    t = -(-x.shape[1] // (getattr(config, "patch_size_t", None) or 1))
    _, h, w = _latent(model, x, t_dim=1)
    return Layout((t, h, w), text=call["encoder_hidden_states"].shape[1])


def _mochi(model: nn.Module, call: dict[str, Any]) -> Layout:
    return Layout(_latent(model, call["hidden_states"]), text_first=False)  # only valid text joins, one sample a call


def _ltx(model: nn.Module, call: dict[str, Any]) -> Layout:
    if call.get("num_frames") is None:
        return nothing("the caller gives LTX no num_frames, height and width")
    return Layout((int(call["num_frames"]), int(call["height"]), int(call["width"])), text=0)


def _sd3(model: nn.Module, call: dict[str, Any]) -> Layout:
    return Layout(_image(model, call), text_first=False, text=call["encoder_hidden_states"].shape[1])


def _plain_image(model: nn.Module, call: dict[str, Any]) -> Layout:
    return Layout(_image(model, call), text=0)


def _image(model: nn.Module, call: dict[str, Any]) -> Grid:
    (h, w), config = call["hidden_states"].shape[-2:], cast(Any, model.config)
    return 1, h // config.patch_size, w // config.patch_size


def _qwen(model: nn.Module, call: dict[str, Any]) -> Layout:
    shapes = call["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    t, h, w = shapes[0]
    extra = sum(i * j * k for i, j, k in shapes[1:])
    return Layout((t, h, w), text=call["encoder_hidden_states"].shape[1], extra=extra)


def _zimage(model: nn.Module, call: dict[str, Any]) -> Layout:
    x, patch, patch_t = call["x"][0], call["patch_size"], call["f_patch_size"]
    if isinstance(x, list):
        return nothing("Z-Image puts captions first in its omni mode")
    t, h, w = x.shape[1] // patch_t, x.shape[2] // patch, x.shape[3] // patch
    return Layout((t, h, w), text_first=False, extra=-(t * h * w) % 32)


Finder = Callable[[nn.Module, dict[str, Any]], Layout]
FINDERS: tuple[tuple[str, Finder], ...] = (
    ("Flux", _flux),
    ("CogVideoX", _cogvideox),
    ("HunyuanVideo", _hunyuan),
    ("Mochi", _mochi),
    ("Wan", _wan),
    ("SkyReelsV2", _wan),
    ("CosmosTransformer3D", _wan),
    ("LTX", _ltx),
    ("SD3", _sd3),
    ("PixArt", _plain_image),
    ("SanaTransformer2D", _plain_image),
    ("QwenImageTransformer", _qwen),
    ("ZImage", _zimage),
)
