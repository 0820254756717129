"""Released ViG checkpoints, plain and hierarchical, old and new layouts -> the names of our modules.

Files are read with ``weights_only`` by timm; a file that needs more than that must be converted first, on purpose.
"""

from __future__ import annotations

import math
import re

from torch import Tensor, nn

from foveal.vision.vig_position import resample

# In this order. Hierarchical only: the older layout of the stem, blocks and head, then the head's place in timm.
RENAMED = (
    (r"^patch_embed\.proj\.(weight|bias)$", r"patch_embed.0.\1"),
    (r"^patch_embed\.norm\.(weight|bias)$", r"patch_embed.2.\1"),
    (r"\.ln_1\.", ".norm."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.self_attention\.", ".op."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def unwrapped(state_dict: dict) -> dict[str, Tensor]:
    """The averaged weights if the file holds them, else the model's, else the dict itself; without ``module.``."""
    for key in ("model_ema", "model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    return {name.removeprefix("module."): x for name, x in state_dict.items()}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """timm's ``pretrained_filter_fn``. ValueError when positions of another length do not form a square."""
    found = unwrapped(state_dict)
    if hasattr(model, "pos_embed"):
        if "pos_embed" in found:
            found["pos_embed"] = fitted(found["pos_embed"], model)
        return found
    renamed = {}
    for name, x in found.items():
        if name.startswith("outnorm"):  # norms of dense prediction, no part of a classifier
            continue
        for pattern, to in RENAMED:
            name = re.sub(pattern, to, name)
        target = model.get_parameter(name) if name in dict(model.named_parameters()) else None
        renamed[name] = x.flatten(1) if target is not None and x.ndim == 4 and target.ndim == 2 else x
    return renamed


def fitted(positions: Tensor, model: nn.Module) -> Tensor:
    """[1, N, D] -> the model's number of tokens."""
    height, width = model.grid_size  # type: ignore[misc]
    n = positions.shape[1]
    if n == height * width:
        return positions
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(
            f"the checkpoint holds {n} positions, which form no square; resample them to the model's {height} by {width} grid first."
        )
    return resample(positions, (side, side), height, width)
