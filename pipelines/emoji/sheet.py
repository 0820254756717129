"""The sheet of pictures, and sprites: every picture at one exact size, ready to be pasted.

Notable choices
- Colours are multiplied by their opacity before they are resized, so outlines do not pick up the black behind them.
- Resizing is bicubic with antialiasing, done once per size on the CPU; everything that draws or reads uses the same
  sprites.

P pictures, s edge of a sprite in pixels
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.pipelines.emoji.pictures import NAMES
from foveal.pipelines.emoji.png import read_png

FILE = Path(__file__).parent.parent / "assets" / "emoji-pictures" / "sheet.png"
PIXELS = 128  # edge of a picture in the sheet
COLUMNS = 16


@lru_cache(maxsize=1)
def pictures() -> Tensor:
    """All pictures, opacity-multiplied RGB and opacity.  -> [P, 4, 128, 128] fp32 in [0, 1]"""
    sheet = torch.from_numpy(read_png(FILE)).float() / 255
    rows = len(NAMES) // COLUMNS
    tiles = sheet.view(rows, PIXELS, COLUMNS, PIXELS, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, PIXELS, PIXELS)
    return torch.cat([tiles[:, :3] * tiles[:, 3:], tiles[:, 3:]], 1)


@lru_cache(maxsize=32)
def sprites(size: int, device: torch.device) -> Tensor:
    """Every picture at `size` pixels.  -> [P, 4, s, s] fp32, opacity-multiplied RGB and opacity"""
    whole = pictures()
    if size != PIXELS:
        whole = F.interpolate(whole, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    colour, opacity = whole[:, :3], whole[:, 3:]
    return torch.cat([torch.minimum(colour, opacity), opacity], 1).to(device)  # bicubic overshoot would glow
