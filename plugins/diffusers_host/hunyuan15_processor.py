"""HunyuanVideo 1.5: its attention processor restated, without the mask over all pairs of tokens.

Letters: B batch, H heads, N visual tokens, L text tokens, K kept text tokens, D head dim.

* diffusers builds a bool [B, 1, N + L, N + L] mask in every layer (12.9 GB at 720p and 121 frames), before any backend is asked.
* The model puts valid text first. So everything behind the longest prompt of the batch is cut off before the projections, and what
  padding is left in shorter prompts is a key mask [B, 1, 1, N + K]; a batch of one needs none, and keeps the fast dense kernels.
* Cut rows come back as zeros. Nothing reads them: padded keys are never attended, everything else in a block is per token, and the
  model drops its text at the end.
* With gradients nothing is cut: a block that is recomputed later must see what it saw, whatever ran in between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.plugins.diffusers_host import private
from foveal.plugins.diffusers_host.root_hook import NOW, Frame

Rope = tuple[Tensor, Tensor]


def restated(original: Any, frame: Frame) -> HunyuanVideo15Processor | None:
    """Our processor for one of diffusers' own; None for every other class, subclasses included."""
    kind = type(original)
    ours = kind.__name__ == "HunyuanVideo15AttnProcessor2_0" and kind.__module__.startswith("diffusers.")
    return HunyuanVideo15Processor(frame) if ours else None


class HunyuanVideo15Processor:
    """Joint attention of visual and valid text tokens. frame: of the model call, which knows how much text is valid.

    Equals diffusers' processor on visual and valid text rows; its attention is one dispatcher call, as there.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._attention_backend: Any = None
        self._parallel_config: Any = None
        self._attention, self._rotate = private.dispatcher(), private.rotary()

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor,
        image_rotary_emb: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """hidden_states [B, N, H * D], encoder_hidden_states [B, L, H * D], attention_mask [B, L] -> (visual, text)"""
        visual, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        kept, padded = self._kept(text)
        q, k, v = self._qkv(attn, hidden_states, encoder_hidden_states[:, :kept], image_rotary_emb)
        mask = F.pad(attention_mask[:, :kept].bool(), (visual, 0), value=True)[:, None, None] if padded else None
        out = self._attention(
            q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        out = out.flatten(2).to(q.dtype)
        joined = attn.to_add_out(out[:, visual:])
        return attn.to_out[1](attn.to_out[0](out[:, :visual])), F.pad(joined, (0, 0, 0, text - kept))

    def _kept(self, text: int) -> tuple[int, bool]:
        """(text tokens to keep, is there padding among them): what the model call found, or everything where it cannot tell."""
        frame = NOW.frame
        if frame is None or frame is not self.frame or torch.is_grad_enabled() or frame.kept is None:
            return text, True
        return frame.kept.shape[0], frame.valid_text is not None

    def _qkv(self, attn: Any, visual: Tensor, text: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """-> q, k, v [B, N + K, H, D]"""
        q, k, v = (_heads(x, attn.heads) for x in (attn.to_q(visual), attn.to_k(visual), attn.to_v(visual)))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if rope is not None:
            q, k = (self._rotate(x, rope, sequence_dim=1) for x in (q, k))
        added = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        text_q, text_k, text_v = (_heads(x, attn.heads) for x in added)
        if attn.norm_added_q is not None:
            text_q = attn.norm_added_q(text_q)
        if attn.norm_added_k is not None:
            text_k = attn.norm_added_k(text_k)
        return torch.cat((q, text_q), dim=1), torch.cat((k, text_k), dim=1), torch.cat((v, text_v), dim=1)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1))
