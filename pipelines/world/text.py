"""Prompts of the world as what the transformer is given for `encoder_hidden_states`.

B clips, L = 10 slots, E width
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from foveal.pipelines.slot_table import SlotTable
from foveal.pipelines.world.vocabulary import N_SLOTS, VOCAB, attributes_of, parse, word_ids


class TextTable(SlotTable):
    """The table of the world's words.  ids [B, 10] int64 -> [B, 10, dim]"""

    def __init__(self, dim: int = 64) -> None:
        super().__init__(len(VOCAB), N_SLOTS, dim)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, 10, dim]. Raises `PromptError` for a prompt outside the grammar."""
        return self(word_ids(attributes_of([parse(prompt) for prompt in prompts], self.device)))
