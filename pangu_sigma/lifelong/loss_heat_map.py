"""The matrix as a heat map by matplotlib: SVG for light and dark pages; one panel, or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.monitor.printable_text import shortened
from pangu_sigma.monitor.text_tables import number
from pangu_sigma.report.svg_figure import colour, draw_svg, pixel_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL, ROW, TOP, LEFT, TITLE, GAP = 96, 44, 34, 116, 30, 12  # px


@dataclass(frozen=True)
class Panel:
    """One matrix of losses [1 + stages, domains] in nats per token, whose first row is the untrained model's.

    NaN: not measured. rows: names of the rows. learned: domain -> number of the stage (from 0) that learned it, None
    for none. lowest and highest [domains]: where the colour begins and is full; the matrix' own where None.
    """

    losses: np.ndarray
    rows: Sequence[str]
    learned: Mapping[str, int | None]
    title: str = ""
    lowest: np.ndarray | None = None
    highest: np.ndarray | None = None


def heat_map(panels: Sequence[Panel], columns: int = 1) -> str:
    """SVG file of the panels' losses, a row per stage and a column per domain, in a grid of `columns`.

    Colour: how far a loss lies above the domain's lowest, full at the highest (of the untrained model, as a rule).
    Outlined: the stage that learned the domain; under later losses, the gain since then, negative where something was
    forgotten. Italic: not learned yet.
    """
    columns = min(columns, len(panels))
    width = LEFT + GAP + CELL * max(len(panel.learned) for panel in panels)
    height = TOP + GAP + ROW * max(len(panel.rows) for panel in panels) + TITLE * any(panel.title for panel in panels)

    def draw(figure: Figure) -> None:
        axes = pixel_axes(figure)
        for index, panel in enumerate(panels):
            _draw_panel(axes, panel, index % columns * width, index // columns * height)

    label = "; ".join(filter(None, (panel.title for panel in panels))) or "Held-out loss after every stage"
    return draw_svg(label, width * columns, height * -(-len(panels) // columns), draw, css="heat", alone=True)


def _draw_panel(axes: Axes, panel: Panel, left: float, top: float) -> None:
    losses = panel.losses
    measured = np.where(np.isnan(losses), np.inf, losses)
    low = measured.min(axis=0) if panel.lowest is None else panel.lowest
    high = np.where(np.isnan(losses), -np.inf, losses).max(axis=0) if panel.highest is None else panel.highest
    heat = np.where(np.isnan(losses), 0, np.clip((losses - low) / np.where(high > low, high - low, np.inf), 0, 1))
    left += LEFT
    if panel.title:
        axes.text(left, top + 18, panel.title, weight="bold", size=14)
        top += TITLE
    axes.text(left - 10, top + TOP - 12, "after stage", ha="right", color=colour("faint"))
    top += TOP
    for row, name in enumerate(panel.rows):
        weight = "bold" if row else "normal"  # the first row is the untrained model
        axes.text(left - 10, top + (row + 0.5) * ROW, shortened(name, 15), ha="right", va="center", weight=weight)
    for column, (name, learned_at) in enumerate(panel.learned.items()):
        middle = left + (column + 0.5) * CELL
        axes.text(middle, top - 12, shortened(name, 15), ha="center", weight="bold")
        learned = None if learned_at is None else learned_at + 1
        for row in range(len(panel.rows)):
            corner = (left + column * CELL + 1.5, top + row * ROW + 1.5)
            _draw_cell(axes, corner, losses[:, column], row, learned, 0.8 * heat[row, column])


def _draw_cell(
    axes: Axes, corner: tuple[float, float], losses: np.ndarray, row: int, learned: int | None, heat: float
) -> None:
    """One cell with its loss and gain; `learned` is the row that learned the column's domain."""
    from matplotlib.patches import Rectangle

    edge = {"edgecolor": colour("s0"), "linewidth": 2} if learned == row else {"linewidth": 0}
    axes.add_patch(Rectangle(corner, CELL - 3, ROW - 3, facecolor=colour("even"), linewidth=0))
    axes.add_patch(Rectangle(corner, CELL - 3, ROW - 3, facecolor=(colour("s7"), heat), **edge))
    x, y = corner[0] + CELL / 2 - 1.5, corner[1] + ROW / 2 - 1.5
    later = learned is not None and row > learned
    style = "normal" if later or learned == row else "italic"
    axes.text(x, y - 8 * later, number(losses[row]), ha="center", va="center", size=12.5, style=style)
    if later:
        gain = number(losses[learned] - losses[row], sign=True)
        axes.text(x, y + 9, gain, ha="center", va="center", color=colour("soft"))
