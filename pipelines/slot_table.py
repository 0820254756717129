"""Prompt encoding of the toy models: a learnt table of words plus a learnt table of slots. No tokenizer, no language model.

`encoding[slot] = E_word[word id] + E_slot[slot]`. Id 0 is the null word; all slots null is the unconditional prompt.

B samples, L slots, E width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SlotTable(nn.Module):
    """Word and slot embeddings of width `dim`.  ids [B, L] int64 -> [B, L, dim]"""

    def __init__(self, words: int, slots: int, dim: int) -> None:
        super().__init__()
        self.E_word = nn.Parameter(torch.randn(words, dim) * 0.5)
        self.E_slot = nn.Parameter(torch.randn(slots, dim) * 0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.E_word.dtype

    @property
    def device(self) -> torch.device:
        return self.E_word.device

    def forward(self, ids: Tensor) -> Tensor:
        return self.E_word[ids] + self.E_slot[None]

    def null(self, batch: int) -> Tensor:
        """The unconditional prompt.  -> [batch, L, dim]"""
        return self(torch.zeros(batch, len(self.E_slot), dtype=torch.long, device=self.device))
