"""Where the tokens of a model call lie, and how much of its text is real, with what must be read from the device kept.

Letters: B batch.

* Image ids and text masks are looked at once per tensor: one wait for the device at the first step of a run, none after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveal.plugins.diffusers_host.families import Known
from foveal.plugins.diffusers_host.grid import Layout, leading_lengths

KEPT = 4  # tensors whose content is remembered: prompts and negative prompts of a few branches


class Once:
    """Remembers what was read from the last few tensors. They are kept, so that their memory cannot come back as others."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, int, Any, Any]] = []

    def __call__(self, tensor: Tensor, other: Any, read: Callable[[], Any]) -> Any:
        """``read()``, unless the same tensor was read before, unchanged and with an equal ``other``."""
        for known, version, with_, value in self._known:
            if known is tensor and version == tensor._version and with_ == other:
                return value
        value = read()
        self._known = [(tensor, tensor._version, other, value), *self._known[: KEPT - 1]]
        return value


class Placing:
    """Reads the calls of one model."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self._ids, self._masks = Once(), Once()
        self._lengths: dict[tuple[Any, ...], Tensor] = {}

    @property
    def family(self) -> str:
        return "" if self.known.family is None else self.known.family.name

    def layout(self, model: nn.Module, call: dict[str, Any]) -> Layout:
        """Never raises for an odd call: no grid, and the reason."""
        ids, text = call.get("img_ids"), call.get("encoder_hidden_states")
        if not isinstance(ids, Tensor) or not isinstance(text, Tensor) or call.get("kv_cache_mode"):
            return self.known.layout(model, call)
        return self._ids(ids, text.shape[1], lambda: self.known.layout(model, call))

    def valid_text(self, call: dict[str, Any], device: torch.device) -> Tensor | None:
        """Valid text tokens per sample, int32 [B] on the device, or None where all are valid or no length says which are."""
        family = self.known.family
        if family is None:
            return None
        if family.mask is not None:
            mask = call.get(family.mask)
            return self._masks(mask, None, lambda: leading_lengths(mask)) if isinstance(mask, Tensor) else None
        lengths = None if family.valid is None else family.valid(call)
        if not isinstance(lengths, list):
            return lengths
        return None if len(set(lengths)) == 1 else self._on(device, lengths)

    def _on(self, device: torch.device, lengths: list[int]) -> Tensor:
        """Copying numbers to a device waits for it, so they are copied once per prompt."""
        key = (device, *lengths)
        if key not in self._lengths:
            if len(self._lengths) >= KEPT:
                self._lengths.clear()
            self._lengths[key] = torch.tensor(lengths, dtype=torch.int32, device=device)
        return self._lengths[key]
