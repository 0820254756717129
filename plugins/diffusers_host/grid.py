"""The token grid of one model call, read from the arguments of the root forward: one finder per family.

Letters: B batch, C channels, N tokens, T, H, W the token grid (images have T = 1).

* Only shapes are read, except for image ids, whose rows and columns are looked at once per tensor (one wait for the device).
* Ids are trusted only if they are row-major and complete; everything doubtful is "no grid" with a reason, and runs dense.
* The order in a sequence is (text,) visual, extra (, text): reference images and padding always follow the visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.plugins.diffusers_host import hunyuan15
from foveal.plugins.site import Grid

UNKNOWN = "the token grid of this model is unknown"
FRAMEPACK = "FramePack mixes history tokens of several scales in one sequence, which is no grid"
FLUX2_CACHE = "Flux2 puts reference tokens first, or leaves them to its cache, in its KV cache modes"
LAYERED = "Qwen-Image-Layered generates several pictures in one sequence"
OMNI = "Z-Image puts captions and reference images first in its omni mode"
NO_SIZES = "the caller gives LTX no num_frames, height and width (video_coords alone do not show a grid)"
RAGGED = "the pictures of the batch have different sizes"
Z_IMAGE_MULTIPLE = 32  # Z-Image pads pictures and captions to multiples of this


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


# ---- text lengths
def text_lengths(call: dict[str, Any]) -> Tensor | None:
    """Valid text tokens per sample, int32 [B] on the device, from ``encoder_attention_mask`` [B, N_text]; never waits."""
    if "encoder_attention_mask_2" in call:
        return hunyuan15.valid_text(call)
    mask = call.get("encoder_attention_mask")
    return mask.sum(dim=1, dtype=torch.int32) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def leading_lengths(mask: Tensor) -> Tensor | None:
    """Lengths int32 [B] of a mask [B, N_text] whose valid tokens lead every row; None for any other. Waits for the device once."""
    valid = mask.bool()
    lengths = valid.sum(dim=1, dtype=torch.int32)
    lead = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    return lengths if bool((lead == valid).all()) else None


def padded_captions(call: dict[str, Any]) -> list[int]:
    """Caption tokens of every sample of a Z-Image call, padding to a multiple included."""
    return [-(-len(caption) // Z_IMAGE_MULTIPLE) * Z_IMAGE_MULTIPLE for caption in call["cap_feats"]]


# ---- video
def latent_grid(model: nn.Module, x: Tensor, t_dim: int = 2) -> Grid:
    """[B, C, T, H, W] latents and the patch size -> grid."""
    config: Any = model.config
    patch, patch_t = config.patch_size, getattr(config, "patch_size_t", None) or 1
    t, h, w = patch if isinstance(patch, (tuple, list)) else (patch_t, patch, patch)
    return x.shape[t_dim] // t, x.shape[-2] // h, x.shape[-1] // w


def video(model: nn.Module, call: dict[str, Any]) -> Layout:
    """Flow maps (AnyFlow: a second time says where the step goes) put frames before channels."""
    return Layout(latent_grid(model, call["hidden_states"], t_dim=1 if "r_timestep" in call else 2), text=0)


def hunyuan(model: nn.Module, call: dict[str, Any]) -> Layout:
    if "latents_clean" in call:
        return nothing(FRAMEPACK)
    if "encoder_attention_mask_2" in call:
        return Layout(latent_grid(model, call["hidden_states"]), text_first=False, text=hunyuan15.kept_text(call))
    text = call["encoder_hidden_states"].shape[1]
    return Layout(latent_grid(model, call["hidden_states"]), text_first=False, text=text)


def cogvideox(model: nn.Module, call: dict[str, Any]) -> Layout:
    x, config = call["hidden_states"], cast(Any, model.config)  # [B, T, C, H, W]; T is rounded up to whole patches
    t = -(-x.shape[1] // (getattr(config, "patch_size_t", None) or 1))
    _, h, w = latent_grid(model, x, t_dim=1)
    return Layout((t, h, w), text=call["encoder_hidden_states"].shape[1])


def mochi(model: nn.Module, call: dict[str, Any]) -> Layout:
    """Only valid text joins, one sample a call, so the text's length is not known here."""
    return Layout(latent_grid(model, call["hidden_states"]), text_first=False)


def ltx(model: nn.Module, call: dict[str, Any]) -> Layout:
    sizes = [call.get(name) for name in ("num_frames", "height", "width")]
    if any(size is None for size in sizes):
        return nothing(NO_SIZES)
    t, h, w = (int(cast(int, size)) for size in sizes)
    return Layout((t, h, w), text=0)


# ---- pictures
def image_grid(model: nn.Module, x: Tensor) -> Grid:
    """[B, C, H, W] latents and the patch size -> grid."""
    _, _, height, width = x.shape
    config: Any = model.config
    return 1, height // config.patch_size, width // config.patch_size


def image(model: nn.Module, call: dict[str, Any]) -> Layout:
    return Layout(image_grid(model, call["hidden_states"]), text=0)


def sd3(model: nn.Module, call: dict[str, Any]) -> Layout:
    text = call["encoder_hidden_states"].shape[1]
    return Layout(image_grid(model, call["hidden_states"]), text_first=False, text=text)


def flux(model: nn.Module, call: dict[str, Any]) -> Layout:
    if call.get("kv_cache_mode"):
        return nothing(FLUX2_CACHE)
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


def qwen(model: nn.Module, call: dict[str, Any]) -> Layout:
    """``img_shapes``: per sample (frame, h, w), or a list of them whose first is generated and whose others are references."""
    if getattr(cast(Any, model.config), "use_layer3d_rope", False):
        return nothing(LAYERED)
    samples = [tuple(s) if isinstance(s, list) else (s,) for s in call["img_shapes"]]
    if any([tuple(s) for s in sample] != [tuple(s) for s in samples[0]] for sample in samples):
        return nothing(RAGGED)
    (t, h, w), *references = samples[0]
    extra = sum(i * j * k for i, j, k in references)
    return Layout((int(t), int(h), int(w)), text=call["encoder_hidden_states"].shape[1], extra=extra)


def zimage(model: nn.Module, call: dict[str, Any]) -> Layout:
    pictures, patch, patch_t = call["x"], call["patch_size"], call["f_patch_size"]
    if isinstance(pictures[0], list):
        return nothing(OMNI)
    if any(x.shape != pictures[0].shape for x in pictures):
        return nothing(RAGGED)
    _, frames, height, width = pictures[0].shape
    t, h, w = frames // patch_t, height // patch, width // patch
    return Layout((t, h, w), text_first=False, text=max(padded_captions(call)), extra=-(t * h * w) % Z_IMAGE_MULTIPLE)


def levels(model: nn.Module, call: dict[str, Any]) -> Layout:
    """A UNet has a grid per level (see levels.py); a layer outside all levels has none."""
    return nothing("this layer belongs to no level of the UNet that shows its grid")
