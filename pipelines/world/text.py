"""Prompt encoding: a learnt table of words plus a learnt table of slots. No tokenizer, no language model.

`encoding[slot] = E_word[word id] + E_slot[slot]`, passed to the transformer as `encoder_hidden_states`.

B clips, L = 10 slots, E width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveal.pipelines.world.vocabulary import N_SLOTS, VOCAB, attributes_of, parse, word_ids


class TextTable(nn.Module):
    """Word and slot embeddings of width `dim`.  ids [B, 10] int64 -> [B, 10, dim]"""

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

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, 10, dim]. Raises `PromptError` for a prompt outside the grammar."""
        return self(word_ids(attributes_of([parse(prompt) for prompt in prompts], self.device)))

    def null(self, batch: int) -> Tensor:
        """The unconditional prompt: every slot null.  -> [batch, 10, dim]"""
        return self(torch.zeros(batch, N_SLOTS, dtype=torch.long, device=self.device))
