"""Cut the sheet of pictures out of the font: run once, the result is in the repository.

    python -m foveal.pipelines.emoji.make_sheet NotoColorEmoji.ttf

Needs fontTools and Pillow, and the font of Debian's `fonts-noto-color-emoji`. Each of the font's 136 x 128 bitmaps is
cropped to its middle 128 columns (none of ours is wider), so pixels are the font's own; colour under full transparency
is set to black. The font itself is not shipped.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np

from foveal.pipelines.emoji.pictures import CODES
from foveal.pipelines.emoji.png import write_png
from foveal.pipelines.emoji.sheet import COLUMNS, FILE, PIXELS


def main(font: str) -> None:
    """Write the sheet, uint8 RGBA, COLUMNS pictures a row."""
    from fontTools.ttLib import TTFont
    from PIL import Image

    loaded = TTFont(font)
    glyphs, strike = loaded.getBestCmap(), loaded["CBDT"].strikeData[0]
    tiles = []
    for code, _ in CODES:
        picture = np.asarray(Image.open(io.BytesIO(strike[glyphs[code]].imageData)).convert("RGBA"))
        left = (picture.shape[1] - PIXELS) // 2
        tile = picture[:, left : left + PIXELS].copy()
        tile[tile[..., 3] == 0] = 0
        tiles.append(tile)
    rows = len(tiles) // COLUMNS
    sheet = np.stack(tiles).reshape(rows, COLUMNS, PIXELS, PIXELS, 4).transpose(0, 2, 1, 3, 4)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    write_png(Path(FILE), sheet.reshape(rows * PIXELS, COLUMNS * PIXELS, 4))


if __name__ == "__main__":
    main(sys.argv[1])
