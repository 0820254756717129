"""What a call costs, counted: multiply-adds and bytes, complete, also where papers leave parts out.

Letters: B batch, H heads, N tokens, K key width, V value width, C tokens of a chunk. The formulas are those of the algorithm, not of
one implementation: the weights of a chunk's pairs are counted as one full matrix.
"""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import register_flop_formula

CHUNK = 64


def multiply_adds(
    batch: int, heads: int, tokens: int, keys: int, values: int, directions: int = 1, chunk: int = CHUNK
) -> int:
    """Of gated linear attention forward: states written and read in each direction, weights made and applied once."""
    each = directions * 2 * keys * values + chunk * (directions * keys + values)
    return batch * heads * tokens * each


def plain_multiply_adds(batch: int, heads: int, tokens: int, keys: int, values: int) -> int:
    """Of linear attention without order, forward: the sums, and each query with them."""
    return batch * heads * (2 * tokens * keys * values + 2 * tokens * keys)


def bytes_moved(
    batch: int, heads: int, tokens: int, keys: int, values: int, element_bytes: int = 2, gate_bytes: int = 4, directions: int = 1,
    vector: bool = True,
) -> int:  # fmt: skip
    """The least that gated linear attention forward reads and writes: q, k, v, out and gates, once each."""
    each = (2 * keys + 2 * values) * element_bytes + directions * gate_bytes * (keys if vector else 1)
    return batch * heads * tokens * each


def register() -> None:
    """Tell PyTorch's counter about the operators, so that ``FlopCounterMode`` does not count them as free. Twice is once."""
    import torch
    from torch.utils.flop_counter import flop_registry

    from foveal.kernels.gated_linear import operator, plain_operator  # noqa: F401  (they define the operators)

    for name, formula in (("gated_linear_attention", _gated), ("linear_attention", _plain)):
        for suffix, factor in (("", 2), ("_backward", 5)):  # the backward makes the states again
            packet = getattr(torch.ops.foveal, name + suffix)
            if packet not in flop_registry:
                register_flop_formula(packet)(formula(factor, bool(suffix)))


def _gated(factor: int, backward: bool) -> Any:
    def formula(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        q, _k, v, forward, reverse = shapes[2:7] if backward else shapes[:5]
        return factor * multiply_adds(q[0], q[1], q[2], q[3], v[-1], (forward is not None) + (reverse is not None))

    return formula


def _plain(factor: int, backward: bool) -> Any:
    def formula(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        q, _k, v = shapes[1:4] if backward else shapes[:3]
        return factor * plain_multiply_adds(q[0], q[1], q[2], q[3], v[-1])

    return formula
