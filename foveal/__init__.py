"""foveal: sparse, cached and linear attention for the models that see and draw.

    import foveal
    handle = foveal.accelerate(pipe, "grat", group=(1, 16, 16))     # a diffusers pipeline or model
    print(handle.summary())
    handle.remove()                                                 # restores every bit

Names are loaded on first use (PEP 562): importing foveal imports neither torch nor diffusers, triton or timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveal.kernels.block_sparse import BlockPlan, Box, KernelOptions, Proxies, block_sparse_attention
    from foveal.kernels.gated_linear import (
        bidirectional_gated_linear_attention,
        gated_linear_attention,
        gated_linear_step,
        linear_attention,
    )
    from foveal.kernels.merge import merge_attention
    from foveal.pipelines.presets import preset
    from foveal.pipelines.shipped import load
    from foveal.plugins.accelerate import accelerate, handle_of
    from foveal.plugins.diffusers_host.processors import GRATAttnProcessor, NeighborhoodAttnProcessor
    from foveal.plugins.method import Method, MethodError, methods
    from foveal.plugins.method import make as make_method
    from foveal.plugins.methods.dense import Dense
    from foveal.plugins.methods.grat import GRAT
    from foveal.plugins.methods.neighborhood import Neighborhood

__version__ = "0.1.0"

_HOME: dict[str, str] = {
    "BlockPlan": "foveal.kernels.block_sparse",
    "Box": "foveal.kernels.block_sparse",
    "Dense": "foveal.plugins.methods.dense",
    "GRAT": "foveal.plugins.methods.grat",
    "GRATAttnProcessor": "foveal.plugins.diffusers_host.processors",
    "KernelOptions": "foveal.kernels.block_sparse",
    "Method": "foveal.plugins.method",
    "MethodError": "foveal.plugins.method",
    "Neighborhood": "foveal.plugins.methods.neighborhood",
    "NeighborhoodAttnProcessor": "foveal.plugins.diffusers_host.processors",
    "Proxies": "foveal.kernels.block_sparse",
    "accelerate": "foveal.plugins.accelerate",
    "bidirectional_gated_linear_attention": "foveal.kernels.gated_linear",
    "block_sparse_attention": "foveal.kernels.block_sparse",
    "gated_linear_attention": "foveal.kernels.gated_linear",
    "gated_linear_step": "foveal.kernels.gated_linear",
    "handle_of": "foveal.plugins.accelerate",
    "linear_attention": "foveal.kernels.gated_linear",
    "load": "foveal.pipelines.shipped",
    "make_method": "foveal.plugins.method",
    "merge_attention": "foveal.kernels.merge",
    "methods": "foveal.plugins.method",
    "preset": "foveal.pipelines.presets",
}
_RENAMED = {"make_method": "make"}

__all__ = [
    "GRAT",
    "BlockPlan",
    "Box",
    "Dense",
    "GRATAttnProcessor",
    "KernelOptions",
    "Method",
    "MethodError",
    "Neighborhood",
    "NeighborhoodAttnProcessor",
    "Proxies",
    "__version__",
    "accelerate",
    "bidirectional_gated_linear_attention",
    "block_sparse_attention",
    "gated_linear_attention",
    "gated_linear_step",
    "handle_of",
    "linear_attention",
    "load",
    "make_method",
    "merge_attention",
    "methods",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foveal' has no attribute {name!r}")
    value: Any = getattr(import_module(_HOME[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
