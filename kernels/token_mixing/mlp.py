"""All that follows a narrow block's attention in one launch, for inference: mix of two branches, projection, residual sums, RMS norm, SwiGLU.

Letters: B batch, N tokens, H heads, D width, V width of a head, I hidden width.

Notable choices: only for narrow tokens, whose sums fit the registers: five tensors of tokens pass memory, and nothing between.
Wider ones go through separate products.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from foveal.kernels.token_mixing import dispatch
from foveal.kernels.token_mixing.launching import Form, ceil

WIDEST = 192
CHIPS = (9, 10)  # major compute capabilities with enough shared memory for two programs at a time
# Of nine tiles the fastest on an H100: 163 us for 65,536 tokens of 192 channels in bf16, where separate kernels take 198 (with the MLP in one).
TILE: dict[str, Any] = {"BT": 64, "BI": 16, "STAGES": 4, "PRODUCT": "ieee", "num_warps": 4, "num_stages": 4}


def parts(width: int) -> tuple[int, int] | None:
    """width as the sum of two powers of two, the second half of the first or 0; None where it is no such number."""
    first = 1 << max(0, width.bit_length() - 1)
    return (first, width - first) if width in (first, first + first // 2) else None


def fits(x: Tensor, head: int, hidden: int) -> bool:
    """Whether x [B, N, D] is narrow enough, in parts, heads and hidden channels that products take, and on a chip with the memory."""
    found = parts(x.shape[-1])
    if found is None or x.shape[-1] > WIDEST or found[0] < 16 or 0 < found[1] < 16 or hidden % TILE["BI"]:
        return False
    return head >= 16 and head & (head - 1) == 0 and (not x.is_cuda or dispatch.capability(x)[0] in CHIPS)


@functools.lru_cache(maxsize=256)
def form(width: int, hidden: int, head: int, silu: bool) -> Form:
    from foveal.kernels.token_mixing.mlp_kernel import mix_and_mlp

    tile = dict(TILE)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    d0, d1 = parts(width) or (0, 0)
    return Form(mix_and_mlp, {"D0": d0, "D1": d1, "I": hidden, "V": head, "SILU": silu} | tile, **options)


def mix_and_mlp_into(
    y: Tensor, x: Tensor, local: Tensor, seen: Tensor, logits: Tensor, bias: Tensor, local_weight: Tensor, seen_weight: Tensor,
    out_weight: Tensor, norm: Tensor, up: Tensor, down: Tensor, local_eps: float, seen_eps: float, eps: float, silu: bool,
) -> None:  # fmt: skip
    """s = x + ``mix_branches(local, seen, logits, ..)`` out_weight^T; y = s + (silu(a) * b) down^T, [a, b] = rms_norm(s, norm) up^T.

    y, x, local [B, N, D], seen [B, N, H, V], out_weight [D, D], up [2 I, D] and down [D, I] contiguous, logits [B, N, D] with even rows: where
    ``fits`` says so, without a check.
    """
    b, n, d = x.shape
    made = form(d, down.shape[-1], seen.shape[-1], silu)
    tensors = (x, local, seen, logits, bias, local_weight, seen_weight, out_weight, norm, up, down, y)
    made(ceil(b * n, TILE["BT"]), tensors, (logits.stride(1),), (b * n,), (local_eps, seen_eps, eps))
