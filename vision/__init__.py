"""Backbones in timm's registry. Importing this package registers them: ``import foveal.vision; timm.create_model("vig_tiny_patch16_224")``."""

from importlib.util import find_spec

if find_spec("timm") is None:
    raise ImportError(
        "foveal.vision builds on timm, which is not installed; install it with: pip install 'foveal[timm]'."
    )

from foveal.vision import biformer as biformer
from foveal.vision import vig as vig
from foveal.vision import vig_hierarchical as vig_hierarchical
