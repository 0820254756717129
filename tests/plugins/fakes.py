"""Small methods for the host's tests: one that looks, one that masks, one that shuffles."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from foveal.plugins.method import Method
from foveal.plugins.order import order_of


def shuffled_order(grid, seed=0):
    """A random permutation in the shape of an order."""
    n = grid[0] * grid[1] * grid[2]
    token = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(order_of(grid, (1, 1, 1)), token=token, inverse=token.argsort(), identity=False)


@dataclass(frozen=True, kw_only=True)
class Spy(Method):
    """Dense; keeps the site and v of every call. ``shuffle`` also declares a random order."""

    name: ClassVar[str] = "spy"
    shuffle: bool = False
    seen: list = field(default_factory=list, compare=False, hash=False)

    def order(self, grid):
        return shuffled_order(grid) if self.shuffle else None

    def plan(self, q, k, v, site, state):
        self.seen.append((site, v.detach().clone()))
        state["calls"] = state.get("calls", 0) + 1
        return None


@dataclass(frozen=True, kw_only=True)
class Masked(Method):
    """Masked SDPA by the site alone: visual tokens see grid neighbours within ``reach`` and the valid text; text sees all."""

    name: ClassVar[str] = "masked"
    reach: int = 1
    shuffle: bool = False

    def order(self, grid):
        return shuffled_order(grid) if self.shuffle else None

    def attend(self, q, k, v, site, state):
        mask = self.mask(site, q.shape[0], q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=site.scale)

    def mask(self, site, batch, device):
        t, h, w = site.grid
        at = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(
            -1, 3
        )
        if site.ordered:
            at = at[self.order(site.grid).token]
        near = ((at[:, None] - at[None]).abs() <= self.reach).all(-1)
        mask = torch.ones(batch, site.tokens, site.tokens, dtype=torch.bool)
        mask[:, site.visual.start : site.visual.stop, site.visual.start : site.visual.stop] = near
        if site.text is not None and site.valid_text is not None:
            for sample, valid in enumerate(site.valid_text.tolist()):
                mask[sample, :, site.text.start + valid : site.text.stop] = False
        return mask.to(device)
