"""What an attention layer is for, by the model's class and the layer's place in it.

diffusers has no reliable mark of its own (``is_cross_attention`` exists on some classes only, and CogVideoX calls joint attention
``attn1``), so the table below is the knowledge. The first match wins; a layer that matches nothing is "unknown" and left alone.
"""

from __future__ import annotations

import re

from torch import nn

ROLES = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"token_refiner|context_refiner|siglip_refiner", "text"),
        (r"motion_modules|temporal_transformer_blocks", "temporal"),
        (r"audio_to_video_attn$|video_to_audio_attn$", "av_cross"),
        (r"audio_attn", "audio"),
        (r"^(Flux|Flux2|QwenImage|HunyuanVideo|CogVideoX|Mochi)\w*:", "joint"),
        (r"^SD3\w*:.*\.attn$", "joint"),
        (r"^SD3\w*:.*\.attn2$", "self"),
        (r"^ZImage\w*:layers", "joint"),
        (r"^ZImage\w*:noise_refiner", "self"),
        (r"\.attn1$", "self"),
        (r"\.attn2$", "cross"),
    )
)


def role_of(model: nn.Module, name: str) -> str:
    """Role of the attention module ``name`` of a model: "self", "joint", "cross", "text", "temporal", ... or "unknown"."""
    key = f"{type(model).__name__}:{name}"
    return next((role for pattern, role in ROLES if pattern.search(key)), "unknown")
