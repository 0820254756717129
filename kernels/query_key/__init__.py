"""Queries and keys made ready for attention in one pass: norm, rotation, token order."""

from foveal.kernels.query_key.api import norm_and_rotate, refusal
from foveal.kernels.query_key.parts import Norm, Rotation

__all__ = ["Norm", "Rotation", "norm_and_rotate", "refusal"]
