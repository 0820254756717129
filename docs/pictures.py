"""Draw the pictures of the method pages: ``python docs/pictures.py``."""

from __future__ import annotations

from pathlib import Path

from foveal.plugins.layout import Layout
from foveal.plugins.method import Method
from foveal.plugins.methods.grat import GRAT
from foveal.plugins.methods.neighborhood import Neighborhood
from foveal.plugins.plans.picture import draw_plan

HERE = Path(__file__).parent
GRID, TEXT = (1, 32, 48), 64
PICTURES: dict[str, Method] = {
    "grat-b": GRAT(group=(1, 8, 8), pattern="B", b=1),
    "grat-x": GRAT(group=(1, 8, 8), pattern="X"),
    "neighborhood": Neighborhood(window=(1, 15, 15), tile=(1, 8, 8)),
    "neighborhood-aligned": Neighborhood(window=(1, 24, 24), stride=(1, 8, 8), tile=(1, 8, 8)),
}


def main() -> None:
    layout = Layout.joint(GRID, n_global=TEXT)
    for name, method in PICTURES.items():
        plan = method.static_plan(layout).plan
        picture = draw_plan(plan, GRID, visual=layout.visual, query=20 * GRID[2] + 13, width=640, title=plan.label)
        picture.save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
