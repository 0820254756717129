"""Backbones in timm's registry. Importing this package registers them: ``import foveal.vision; timm.create_model("vig_tiny_patch16_224")``.

Without timm only LINA is here (``foveal.vision.lina``): asking for a backbone says what is missing.
"""

from importlib.util import find_spec

BACKBONES = ("biformer", "vig", "vig_hierarchical")

if find_spec("timm") is not None:
    from foveal.vision import biformer as biformer
    from foveal.vision import vig as vig
    from foveal.vision import vig_hierarchical as vig_hierarchical
    from foveal.vision.context_mixing import ContextMixing as ContextMixing
    from foveal.vision.context_mixing import ContextMixingTokens as ContextMixingTokens
    from foveal.vision.decay_attention import DecayAttention as DecayAttention
    from foveal.vision.decay_attention import SwinDecayAttention as SwinDecayAttention
    from foveal.vision.decay_attention import alternate_shifts as alternate_shifts
    from foveal.vision.gated_attention import GatedAttention as GatedAttention
    from foveal.vision.gated_attention import HeadwiseGatedAttention as HeadwiseGatedAttention
    from foveal.vision.gated_attention import gate_layers as gate_layers
    from foveal.vision.mixture_of_heads import BalanceLoss as BalanceLoss
    from foveal.vision.mixture_of_heads import MixtureOfHeads as MixtureOfHeads
    from foveal.vision.mixture_of_heads import mix_heads as mix_heads
    from foveal.vision.neighborhood_mixing import neighborhood_mix as neighborhood_mix
    from foveal.vision.scan_routes import ScanAttention as ScanAttention
    from foveal.vision.scan_routes import scan_route as scan_route
    from foveal.vision.sparsifiner import SparsifinerAttention as SparsifinerAttention
    from foveal.vision.sparsifiner import block_connectivity as block_connectivity
    from foveal.vision.token_layer import bind_grid as bind_grid


def __getattr__(name: str) -> object:
    if name in BACKBONES:
        raise ImportError(
            f"foveal.vision.{name} builds on timm, which is not installed; install it with: pip install 'foveal[timm]'."
        )
    raise AttributeError(f"module 'foveal.vision' has no attribute {name!r}")
