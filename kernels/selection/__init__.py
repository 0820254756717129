"""Choosing blocks by what is in them: pooled statistics, block scores, rules that keep some, and lists for a plan. Nothing waits for the device."""

from foveal.kernels.selection.keeping import keep_top_k, keep_top_p
from foveal.kernels.selection.lists import BlockLists, block_lists, top_k_lists, top_p_lists
from foveal.kernels.selection.pooling import BlockStatistics, pool_blocks
from foveal.kernels.selection.scoring import block_probabilities, block_scores

__all__ = [
    "BlockLists",
    "BlockStatistics",
    "block_lists",
    "block_probabilities",
    "block_scores",
    "keep_top_k",
    "keep_top_p",
    "pool_blocks",
    "top_k_lists",
    "top_p_lists",
]
