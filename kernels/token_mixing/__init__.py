"""What stands around attention in a mixer of tokens, each in one pass over memory: convolution, norms, gates, the mix of two branches, SwiGLU."""

from foveal.kernels.token_mixing.convolution import depthwise_conv
from foveal.kernels.token_mixing.gating import log_gates, swiglu
from foveal.kernels.token_mixing.mixing import mix_branches
from foveal.kernels.token_mixing.norm import add_rms_norm, rms_norm
from foveal.kernels.token_mixing.stem import patch_conv, takes_patch_conv

__all__ = [
    "add_rms_norm",
    "depthwise_conv",
    "log_gates",
    "mix_branches",
    "patch_conv",
    "rms_norm",
    "swiglu",
    "takes_patch_conv",
]
