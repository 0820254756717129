"""Linear attention with and without gates: the operators and their implementations."""

from foveal.kernels.gated_linear.api import (
    bidirectional_gated_linear_attention,
    gated_linear_attention,
    gated_linear_step,
)
from foveal.kernels.gated_linear.needs import IMPLEMENTATIONS, Choice, choose, support_table
from foveal.kernels.gated_linear.plain import linear_attention

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "bidirectional_gated_linear_attention",
    "choose",
    "gated_linear_attention",
    "gated_linear_step",
    "linear_attention",
    "support_table",
]
