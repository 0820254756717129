"""HunyuanVideo 1.5: how much of its text is valid, read from the arguments of a model call.

Letters: B batch, L text tokens.

* The model puts valid text first: image tokens, glyphs, prompt; then all padding. So a length per sample says everything.
* What lies behind the longest prompt of the batch never reaches the attention calls (see hunyuan15_processor.py). Its length is read
  on the host: one wait per model call, at its start, where the model itself waits for the same masks.
* With gradients nothing is cut: a block that is recomputed later must see what it saw, whatever ran in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASKS = ("encoder_attention_mask", "encoder_attention_mask_2")


def text_lengths(call: dict[str, Any]) -> Tensor:
    """Valid text tokens per sample: of the prompt, of the glyphs, and all image tokens unless every one is zero. -> int32 [B]"""
    image = call["image_embeds"]
    prompt, glyphs = (call[name].bool().sum(dim=1, dtype=torch.int32) for name in MASKS)
    return prompt + glyphs + (image != 0).any() * image.shape[1]


def kept_text(call: dict[str, Any]) -> int:
    """Text tokens that reach the attention calls."""
    if torch.is_grad_enabled():
        parts = (call["encoder_hidden_states"], call["encoder_hidden_states_2"], call["image_embeds"])
        return sum(x.shape[1] for x in parts)
    return int(text_lengths(call).max())


def valid_text(call: dict[str, Any]) -> Tensor | None:
    """Valid text tokens per sample, int32 [B], or None where all kept ones are valid."""
    if any(not isinstance(call.get(name), Tensor) for name in (*MASKS, "image_embeds")):
        return None
    lengths = text_lengths(call)
    if torch.is_grad_enabled():
        return lengths
    return None if len(lengths) == 1 or bool((lengths == lengths[0]).all()) else lengths
