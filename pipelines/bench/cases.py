"""The cases of `bench kernels`, as data.

Letters: N tokens, H heads, D head dim.

Notable choices
- Lengths are those of models, text included: most are no multiple of 128. The aligned cases are rounded to it.
- ``everybody`` cases run every dense backend, padded and not; elsewhere those that are slower by far are left out to save time.
"""

from __future__ import annotations

from dataclasses import dataclass

Grid = tuple[int, int, int]
SWEEP = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Block-sparse attention with lists given.

    tokens, heads, head_dim   of the call; batch 1
    q_block, kv_block         tokens of a block
    densities                 each a plan of its own, all in one interleaved measurement
    spread                    coefficient of variation of the counts; beside it runs a twin with equal counts
    everybody                 every dense backend, padded and not, and xformers
    flex                      FlexAttention too (about ten seconds of compiling on a GPU)
    flash2                    FlashAttention-2 too: what papers divide by, 1.7 times slower than the baseline on Hopper
    """

    name: str
    tokens: int
    heads: int
    head_dim: int = 128
    q_block: int = 128
    kv_block: int = 128
    densities: tuple[float, ...] = (0.25,)
    spread: float = 0.0
    everybody: bool = False
    flex: bool = False
    flash2: bool = True


@dataclass(frozen=True, kw_only=True)
class WindowCase:
    """A window of stride 1, exact to the token: partial blocks with box masks."""

    name: str
    grid: Grid
    window: Grid
    tile: Grid
    heads: int
    head_dim: int = 128
    flex: bool = True
    flash2: bool = False


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """Gated linear attention. gate: "vector" (per key channel) or "scalar" (per head); training: forward and backward."""

    name: str
    batch: int
    tokens: int
    heads: int = 3
    head_dim: int = 64
    gate: str = "vector"
    training: bool = False


@dataclass(frozen=True, kw_only=True)
class PlainCase:
    """Linear attention without order or gates, normalised by division. training: forward and backward."""

    name: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    training: bool = False


@dataclass(frozen=True, kw_only=True)
class AroundCase:
    """What surrounds attention: token order, selection of an eighth of the blocks, the host's time of a call."""

    tokens: int
    heads: int
    head_dim: int = 128


SPARSE = (
    Case(name="wan-1.3b aligned", tokens=32768, heads=12, densities=SWEEP, everybody=True, flex=True),
    Case(name="hunyuan aligned", tokens=118784, heads=24, densities=SWEEP),
    Case(name="cogvideox, head dim 64", tokens=17776, heads=48, head_dim=64, densities=(0.25, 0.125), everybody=True),
    Case(name="ltx, head dim 64", tokens=7392, heads=32, head_dim=64),
    Case(name="head dim 80", tokens=17792, heads=48, head_dim=80),
    Case(name="head dim 96", tokens=17792, heads=48, head_dim=96),
    Case(name="flux-1024", tokens=4608, heads=24, densities=(0.5, 0.25)),
    Case(name="flux-2048", tokens=16896, heads=24),
    Case(name="flux-4096", tokens=66048, heads=24, flash2=False),
    Case(name="wan2.2-5b ragged", tokens=27280, heads=24),
    Case(name="key blocks of 64", tokens=32768, heads=12, kv_block=64, densities=(0.25, 0.125)),
    Case(name="wan-1.3b ragged", tokens=32760, heads=12, everybody=True),
    Case(name="wan-14b ragged", tokens=75600, heads=40, flash2=False),
    Case(name="hunyuan-544p ragged", tokens=67576, heads=24, flash2=False),
    Case(name="hunyuan ragged", tokens=119056, heads=24, flash2=False),
    Case(name="unequal counts", tokens=32768, heads=12, densities=(0.125,), spread=1.0),
)
WINDOWS = (WindowCase(name="exact window", grid=(30, 48, 80), window=(18, 24, 24), tile=(5, 6, 4), heads=24),)
SIZES = ((256, 196), (64, 1024), (16, 4096))
LINEAR = tuple(
    LinearCase(name=f"{gate} gate, {batch} x {tokens}{', training' * training}", batch=batch, tokens=tokens, gate=gate, training=training)
    for gate in ("vector", "scalar")
    for batch, tokens in SIZES
    for training in (False, True)
)  # fmt: skip
PLAIN = tuple(
    PlainCase(name=f"no order, {tokens} tokens{', training' * training}", batch=1, heads=16, tokens=tokens, head_dim=72, training=training)
    for tokens, training in ((16384, False), (16384, True), (4096, False))
)  # fmt: skip
AROUND = (AroundCase(tokens=118784, heads=24),)
HOST = AroundCase(tokens=2048, heads=2)

TINY_SPARSE = (
    Case(name="tiny", tokens=512, heads=2, head_dim=32, densities=(0.5, 0.25), everybody=True),
    Case(name="tiny ragged", tokens=500, heads=2, head_dim=32, spread=1.0, everybody=True),
    Case(name="tiny key blocks of 64", tokens=512, heads=2, head_dim=32, kv_block=64),
)
TINY_WINDOWS = (
    WindowCase(name="tiny window", grid=(4, 8, 8), window=(2, 5, 4), tile=(2, 4, 4), heads=2, head_dim=32, flex=False),
)
TINY_LINEAR = (
    LinearCase(name="tiny vector gate", batch=2, tokens=70, head_dim=16),
    LinearCase(name="tiny scalar gate, training", batch=2, tokens=70, head_dim=16, gate="scalar", training=True),
)
TINY_PLAIN = (
    PlainCase(name="tiny no order", batch=1, heads=2, tokens=70, head_dim=16),
    PlainCase(name="tiny no order, training", batch=1, heads=2, tokens=70, head_dim=16, training=True),
)
TINY_AROUND = (AroundCase(tokens=512, heads=2, head_dim=32),)
TINY_HOST = AroundCase(tokens=128, heads=2, head_dim=32)
