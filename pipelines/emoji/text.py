"""Prompts of the emoji world as what the transformer is given: an encoding of slots, and their pooled vector.

B samples, L = 8 slots, E width
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from foveal.pipelines.emoji.vocabulary import N_SLOTS, VOCAB, attributes_of, parse, word_ids
from foveal.pipelines.slot_table import SlotTable


class TextTable(SlotTable):
    """The table of the emoji world's words.  ids [B, 8] int64 -> [B, 8, dim]"""

    def __init__(self, dim: int = 64) -> None:
        super().__init__(len(VOCAB), N_SLOTS, dim)

    def encode(self, prompts: Sequence[str], size: int) -> Tensor:
        """Prompts for a frame of `size` pixels -> [B, 8, dim]. Raises `PromptError` for a prompt outside the grammar."""
        return self(word_ids(attributes_of([parse(prompt) for prompt in prompts], self.device), size))


def pooled(encoding: Tensor) -> Tensor:
    """[B, L, E] -> [B, E], of the same spread as one slot"""
    return encoding.sum(1) / encoding.shape[1] ** 0.5
