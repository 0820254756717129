"""LINA: a masked autoregressive image generator with continuous tokens and linear attention.

A connector turns the condition into M query tokens; the trunk (an encoder of visible tokens, a decoder of all) turns partly known
latents into one vector per token; the head turns noise into a token's latent, given that vector.

Letters: B batch, M query tokens, n image tokens, L visible tokens, W numbers of a latent token, D width.
Source: "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens".

Notable choices
- Visible tokens come as a list of positions; a shorter list is filled up and masked out (``valid``), so that samples of a training
  batch may know different numbers of tokens while every shape stays the same.
- A token is its p x p pixels in the order (channel, row, column).
- Names of modules are our own; ``lina_checkpoint`` knows those of the released files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.vision.lina_config import LinaConfig
from foveal.vision.lina_head import FlowHead
from foveal.vision.lina_parts import Block, Connector, LabelEmbed, TextEmbed, positions


class LinaModel(nn.Module):
    """All three parts.

    config    the sizes; a module on the meta device costs nothing: ``LinaModel(config, device="meta")``
    """

    image_position: Tensor
    query_position: Tensor

    def __init__(self, config: LinaConfig, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.config = config
        self.condition: LabelEmbed | TextEmbed = (
            TextEmbed(config, dd) if config.num_classes is None else LabelEmbed(config.num_classes, config.dim, dd)
        )
        self.connector = Connector(config, dd)
        self.embed = nn.Linear(config.token_width, config.dim, **dd)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim, **dd))
        self.encoder = nn.ModuleList(Block(config, dd) for _ in range(config.encoder_depth))
        self.decoder = nn.ModuleList(Block(config, dd, decoder=True) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(config.dim, **dd)
        self.head = FlowHead(config, dd)
        self._place(device)
        if self.mask_token.device.type != "meta":
            self.reset_parameters()

    def _place(self, device: Any) -> None:
        for name, grid in (("image_position", self.config.grid), ("query_position", self.config.grid // 2)):
            self.register_buffer(name, positions(grid, self.config.dim, device), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers, tables and tokens normal with deviation 0.02, biases 0; gates 1; the head's modulations and output 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.condition.weight, self.connector.query, self.mask_token):
            nn.init.normal_(table, std=0.02)
        for block in self.head.blocks:
            nn.init.zeros_(block.modulation.weight)  # type: ignore[union-attr, arg-type]
        for last in (self.head.modulation, self.head.out):
            nn.init.zeros_(last.weight)

    # ---- tokens
    def patchify(self, latents: Tensor) -> Tensor:
        """[B, C, side, side] -> [B, n, W]"""
        c = self.config
        expected = (c.channels, c.side, c.side)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != expected:
            raise ValueError(f"latents are {tuple(latents.shape)}; (batch, {', '.join(map(str, expected))}) is needed.")
        x = latents.reshape(-1, c.channels, c.grid, c.patch, c.grid, c.patch)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c.tokens, c.token_width)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, n, W] -> [B, C, side, side]"""
        c = self.config
        x = tokens.reshape(-1, c.grid, c.grid, c.channels, c.patch, c.patch)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, c.channels, c.side, c.side)

    # ---- the parts
    def queries(self, *condition: Tensor | None) -> Tensor:
        """Labels [B] (num_classes is "no class"), or text states and words as ``TextEmbed`` takes them -> [B, M, D]"""
        return self.connector(self.condition(*condition), self.query_position)

    def trunk(self, tokens: Tensor, queries: Tensor, visible: Tensor, valid: Tensor | None = None) -> Tensor:
        """What is known about every token.

        tokens [B, n, W] (only visible ones are read), queries [B, M, D], visible [B, L] int64: positions of known tokens, no
        position twice; valid [B, L] bool: False for entries that only fill the list up. -> [B, n, D]
        """
        m, n = queries.shape[1], self.config.tokens
        if visible.ndim != 2 or visible.shape[0] != len(tokens) or tokens.shape[1] != n:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)} and visible {tuple(visible.shape)}; (B, {n}, {self.config.token_width}) and (B, L) "
                "are needed."
            )
        if valid is not None:
            visible = torch.where(valid, visible, n)  # one row more takes what is no token
        at = visible[..., None].expand(-1, -1, self.config.dim)
        embedded = self.embed(tokens)
        known = torch.zeros(len(tokens), n + 1, device=tokens.device, dtype=torch.bool)
        known = known.scatter(1, visible, True)[:, :n, None]
        x = torch.where(known, embedded, self.mask_token.to(embedded.dtype)) + self.image_position.to(embedded.dtype)
        x = torch.cat([x, x.new_zeros(len(x), 1, x.shape[2])], 1)
        h = torch.cat([queries.to(x.dtype), x.gather(1, at)], 1)
        mask = None if valid is None else torch.cat([valid.new_ones(len(valid), m), valid], 1)
        for block in self.encoder:
            h = block(h, mask)
        x = x.to(h.dtype).scatter(1, at, h[:, m:])[:, :n]
        h = torch.cat([h[:, :m], x], 1)
        for block in self.decoder:
            h = block(h)
        return self.norm(h)[:, m:]

    def forward(
        self, tokens: Tensor, condition: tuple[Tensor | None, ...], visible: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Condition and partly known tokens -> [B, n, D] for the head."""
        return self.trunk(tokens, self.queries(*condition), visible, valid)

    def resize_gates_(self, grid: int) -> LinaModel:
        """Make the model one for grid x grid tokens (even): positions anew, learned gates resized. Fine-tune it afterwards."""
        self.config = self.config.resized(grid)
        for block in self.decoder:
            assert isinstance(block, Block)
            block.attn.resize_gates_(grid)
        self._place(self.mask_token.device)
        self.connector.queries = self.config.queries
        return self
