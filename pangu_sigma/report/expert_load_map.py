"""Expert load as heat maps: for each sparse layer one row per domain, one cell per expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pangu_sigma.monitor.printable_text import shortened
from pangu_sigma.report.svg_figure import Picture, colour, draw_svg, pixel_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 24
LABEL = 118
NOTE = 62
TABLE_COLUMNS = 64  # the table of a layer with larger groups tells the busiest expert alone


def load_map(layer: str, loads: dict[str, list[int]]) -> Picture:
    """One layer's loads (domain → rows per expert). A cell is an expert's rows over its group's mean: 1 is even.

    Blue is less, red is more, full colour at a half or at twice the mean; the busiest expert's value is at the right.
    """
    ratios = {domain: over_mean(rows) for domain, rows in loads.items()}
    busiest = {domain: f"{max(of_group):.2f} ×" if of_group else "no rows" for domain, of_group in ratios.items()}
    widest = max(map(len, loads.values()), default=1) or 1
    cell = min(38.0, max(7.0, 250 / widest))
    width = LABEL + cell * widest + NOTE

    def draw(figure: Figure) -> None:
        axes = pixel_axes(figure)
        axes.text(width - 2, 12, "busiest", ha="right", color=colour("faint"))
        axes.text(LABEL, 12, f"experts 0…{widest - 1}", color=colour("faint"))
        for index, (domain, of_group) in enumerate(ratios.items()):
            top = 20 + index * ROW
            axes.text(LABEL - 8, top + ROW / 2 + 3, shortened(domain, 16), ha="right")
            where, side = (width - 2, "right") if of_group else (LABEL, "left")
            axes.text(where, top + ROW / 2 + 3, busiest[domain], ha=side, color=colour("ink" if of_group else "faint"))
            _draw_row(axes, of_group, top, cell)

    label = f"Rows per expert over the group's mean in {layer}: "
    label += "; ".join(f"{domain}: busiest {value}" for domain, value in busiest.items())
    columns = widest if widest <= TABLE_COLUMNS else 0
    rows = [
        [domain, busiest[domain], *(f"{ratio:.2f}" for ratio in of_group[:columns]), *[""] * (columns - len(of_group))]
        for domain, of_group in ratios.items()
    ]
    svg = draw_svg(label, width, ROW * len(loads) + 20, draw, css="heat")
    return Picture(svg, ["Domain", "Busiest", *map(str, range(columns))], rows)


def over_mean(rows: Sequence[int]) -> list[float]:
    """Each expert's rows over the mean of its group; empty if the group got no row."""
    total = sum(rows)
    return [n * len(rows) / total for n in rows] if total else []


def _draw_row(axes: Axes, ratios: Sequence[float], top: float, cell: float) -> None:
    from matplotlib.colors import to_rgba

    gap = 2 if cell > 12 else 1
    boxes = [(LABEL + index * cell, cell - gap) for index in range(len(ratios))]
    strengths = [0.75 * min(1.0, abs(math.log2(ratio))) if ratio else 0.75 for ratio in ratios]
    tints = [to_rgba(colour("s7" if r > 1 else "s0"), s) for r, s in zip(ratios, strengths, strict=True)]
    for colours in (colour("even"), tints):
        axes.broken_barh(boxes, (top + 1, ROW - 3), facecolors=colours, linewidth=0)
    for (left, width), ratio in zip(boxes, ratios, strict=True):
        if cell >= 30:
            axes.text(left + width / 2, top + ROW / 2 + 3, f"{ratio:.2f}", ha="center")
