"""What a classifier head may be asked for: the one check of every backbone here."""

from __future__ import annotations

POOLS = ("avg", "")


def check_head(num_classes: int, global_pool: str) -> None:
    """Raises ``ValueError`` for fewer than 0 classes and for a pooling that is not in ``POOLS``."""
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; 0 (no classifier) or more is needed.")
    if global_pool not in POOLS:
        raise ValueError(f"there is no global_pool {global_pool!r} here; choose 'avg', or '' for unpooled output.")
