"""Prompt encoding: a learnt table of words plus a learnt table of slots. No tokenizer, no language model.

`encoding[slot] = E_word[word id] + E_slot[slot]`; the pooled vector is the sum over slots divided by sqrt(L).

B samples, L = 8 slots, E width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveal.pipelines.emoji.vocabulary import N_SLOTS, VOCAB, attributes_of, parse, word_ids


class TextTable(nn.Module):
    """Word and slot embeddings of width `dim`.  ids [B, 8] int64 -> [B, 8, dim]"""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.E_word = nn.Parameter(torch.randn(len(VOCAB), dim) * 0.5)
        self.E_slot = nn.Parameter(torch.randn(N_SLOTS, dim) * 0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.E_word.dtype

    @property
    def device(self) -> torch.device:
        return self.E_word.device

    def forward(self, ids: Tensor) -> Tensor:
        return self.E_word[ids] + self.E_slot[None]

    def encode(self, prompts: Sequence[str], size: int) -> Tensor:
        """Prompts for a frame of `size` pixels -> [B, 8, dim]. Raises `PromptError` for a prompt outside the grammar."""
        return self(word_ids(attributes_of([parse(prompt) for prompt in prompts], self.device), size))

    def null(self, batch: int) -> Tensor:
        """The unconditional prompt: every slot null.  -> [batch, 8, dim]"""
        return self(torch.zeros(batch, N_SLOTS, dtype=torch.long, device=self.device))


def pooled(encoding: Tensor) -> Tensor:
    """[B, L, E] -> [B, E], of the same spread as one slot"""
    return encoding.sum(1) / encoding.shape[1] ** 0.5
