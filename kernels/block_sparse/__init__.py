"""Block-sparse attention: the plan, the operator and its implementations."""

from foveal.kernels.block_sparse.api import Choice, KernelOptions, block_sparse_attention, choose
from foveal.kernels.block_sparse.checks import PlanError
from foveal.kernels.block_sparse.needs import IMPLEMENTATIONS, Needs, support_table
from foveal.kernels.block_sparse.plan import BlockPlan, Box, Proxies

__all__ = [
    "IMPLEMENTATIONS",
    "BlockPlan",
    "Box",
    "Choice",
    "KernelOptions",
    "Needs",
    "PlanError",
    "Proxies",
    "block_sparse_attention",
    "choose",
    "support_table",
]
