"""Where things lie in the sequence of one attention call: grid tokens, text, other tokens, extra keys. Plain numbers, hashable.

Every cached plan is keyed by its whole layout and every call is checked against it, so a plan cannot serve another grid or span.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from foveal.plugins.order import by
from foveal.plugins.site import MethodError, Site, Span


@dataclass(frozen=True)
class Layout:
    """grid of the visual tokens; visual, text, other: spans that tile the sequence; ordered: visual tokens are in plan order.

    ``text`` is the span a per-sample length may cut short; ``other`` spans (prefix, reference) are always valid. ``extra_keys``
    keys follow the sequence on the key side only. Text and other tokens are global: they see and are seen by everything.
    """

    grid: tuple[int, ...]
    visual: Span
    text: Span | None = None
    other: tuple[Span, ...] = ()
    ordered: bool = False
    extra_keys: int = 0

    @staticmethod
    def of(site: Site) -> Layout:
        return Layout(site.grid, site.visual, site.text, site.extra, site.ordered)

    @staticmethod
    def joint(grid: tuple[int, ...], n_global: int = 0, global_first: bool = False, extra_keys: int = 0) -> Layout:
        """Grid tokens in row-major order with ``n_global`` text tokens before or after them."""
        n = math.prod(grid)
        at = n_global if global_first else 0
        text = Span(0, n_global) if global_first else Span(n, n + n_global)
        return Layout(grid, Span(at, at + n), text if n_global else None, extra_keys=extra_keys)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Spans of global tokens, in sequence order."""
        text = (self.text,) if self.text is not None else ()
        return tuple(sorted(s for s in (*text, *self.other) if s.stop > s.start))

    @property
    def global_tokens(self) -> int:
        return sum(s.size for s in self.spans)

    @property
    def tokens(self) -> int:
        """Length of the sequence on the query side."""
        return self.visual.size + self.global_tokens

    @property
    def keys(self) -> int:
        return self.tokens + self.extra_keys

    def check(self) -> Layout:
        """Returns itself. Raises ``MethodError`` unless grid and spans tile the sequence."""
        if not 1 <= len(self.grid) <= 3 or any(
            isinstance(g, bool) or not isinstance(g, int) or g < 1 for g in self.grid
        ):
            raise MethodError(f"the grid is {self.grid}; give 1 to 3 whole numbers of at least 1.")
        if math.prod(self.grid) != self.visual.size:
            raise MethodError(
                f"the grid {by(self.grid)} has {math.prod(self.grid)} tokens; the visual span {tuple(self.visual)} has {self.visual.size}."
            )
        reached = 0
        for span in sorted((self.visual, *self.spans)):
            if span.start != reached:
                raise MethodError(
                    f"spans must tile the sequence without gap or overlap; one starts at token {span.start}, {reached} was due."
                )
            reached = span.stop
        return self

    def check_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raises ``MethodError`` unless q, k, v [B, H, N, D] are tensors of this layout."""
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
            raise MethodError(
                f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions; [batch, heads, tokens, head_dim] is needed."
            )
        if q.shape[2] != self.tokens:
            raise MethodError(
                f"q has {q.shape[2]} tokens; the grid {by(self.grid)} and {self.global_tokens} global tokens make {self.tokens}."
            )
        if k.shape[2] != self.keys or v.shape[2] != self.keys:
            extra = f" and {self.extra_keys} extra keys" if self.extra_keys else ""
            raise MethodError(
                f"k and v have {k.shape[2]} and {v.shape[2]} tokens; this layout needs {self.keys}: the grid {by(self.grid)}, "
                f"{self.global_tokens} global tokens{extra} (attention across different grids is not supported)."
            )
