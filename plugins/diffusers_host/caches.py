"""diffusers' step caches beside an accelerated model: which of them cannot serve the way it is called.

* Most compose, in both orders: they wrap blocks and modules, and foveal sits inside; a skipped layer is simply not called.
* What must be refused mixes guidance passes up: PyramidAttentionBroadcast and FasterCache keep one output per module whatever the
  pass, MagCache does where the pipeline sets no cache context. diffusers goes on silently, or stops with an IndexError.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveal.plugins.diffusers_host.composition import ONE_BATCH, ONE_OUTPUT

BY_MODULE = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")
BY_CONTEXT = ("MagCacheConfig",)


def refusal(config: Any, call: dict[str, Any], several_passes: bool, context: str | None) -> str | None:
    """Why a cache cannot serve this model call, or None. config: of the enabled cache; context: the name of the guidance branch."""
    if config is None:
        return None
    kind = type(config).__name__
    if several_passes and (kind in BY_MODULE or (kind in BY_CONTEXT and context is None)):
        return ONE_OUTPUT.format(cache=kind.removesuffix("Config"))
    x = call.get("hidden_states")
    if kind == "FasterCacheConfig" and not config.is_guidance_distilled and isinstance(x, Tensor) and len(x) % 2:
        return ONE_BATCH.format(batch=len(x))
    return None
