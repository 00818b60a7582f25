"""The matrix as a heat map: SVG that stands alone, for light and dark pages; one panel, or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from pangu_sigma.monitor.printable_text import printable, shortened
from pangu_sigma.monitor.text_tables import number

CELL, ROW, TOP, LEFT, TITLE = 96, 44, 34, 116, 30

_STYLE = """
.lm text{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,Arial,"Noto Sans","PingFang SC",sans-serif;fill:#141413;
font-variant-numeric:tabular-nums}
.lm .lm-soft{fill:#6b6963;font-size:11px}.lm .lm-name{font-weight:600}.lm .lm-cell{fill:#eeede8}
.lm .lm-not{font-style:italic;font-size:11.5px}.lm .lm-title{font-size:14px;font-weight:600}
.lm .lm-heat{fill:#e34948}.lm .lm-own{fill:none;stroke:#2a78d6;stroke-width:2}
@media (prefers-color-scheme:dark){.lm text{fill:#f5f4f0}.lm .lm-soft{fill:#a5a39b}.lm .lm-cell{fill:#30302e}
.lm .lm-heat{fill:#e66767}.lm .lm-own{stroke:#3987e5}}
"""


@dataclass(frozen=True)
class Panel:
    """One matrix of losses [1 + stages, domains] in nats per token, whose first row is the untrained model's.

    rows: names of the rows. learned: domain -> number of the stage (from 0) that learned it, None for none. lowest and
    highest [domains]: where the colour begins and is full; the matrix' own where None.
    """

    losses: np.ndarray
    rows: Sequence[str]
    learned: Mapping[str, int | None]
    title: str = ""
    lowest: np.ndarray | None = None
    highest: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Pixels."""
        return LEFT + CELL * len(self.learned) + 4

    @property
    def height(self) -> int:
        """Pixels."""
        return TOP + ROW * len(self.rows) + 4 + (TITLE if self.title else 0)


def heat_map(panels: Sequence[Panel], columns: int = 1) -> str:
    """SVG of the panels' losses, a row per stage and a column per domain, in a grid of `columns`.

    Colour: how far a loss lies above the domain's lowest, full at the highest (of the untrained model, as a rule).
    Outlined: the stage that learned the domain; under later losses, the change since then. Italic: not learned yet.
    """
    columns = min(columns, len(panels))
    width = max(panel.width for panel in panels) + 12
    height = max(panel.height for panel in panels) + 12
    rows = -(-len(panels) // columns)
    title = "; ".join(filter(None, (printable(panel.title) for panel in panels))) or "Held-out loss after every stage"
    parts = [
        f'<svg class="lm" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * columns} {height * rows}" '
        f'width="{width * columns}" height="{height * rows}" role="img" aria-label="{escape(title)}">'
        f"<style>{_STYLE}</style>"
    ]
    for index, panel in enumerate(panels):
        left, top = index % columns * width, index // columns * height
        parts.append(f'<g transform="translate({left} {top})">{_panel(panel)}</g>')
    return "".join(parts) + "</svg>\n"


def _panel(panel: Panel) -> str:
    losses = panel.losses
    low = losses.min(axis=0) if panel.lowest is None else panel.lowest
    high = losses.max(axis=0) if panel.highest is None else panel.highest
    shift = TITLE if panel.title else 0
    parts = [f'<text class="lm-title" x="{LEFT}" y="18">{escape(printable(panel.title))}</text>'] if shift else []
    parts.append(f'<text class="lm-soft" x="{LEFT - 10}" y="{shift + TOP - 12}" text-anchor="end">after stage</text>')
    for column, name in enumerate(panel.learned):
        column_center = LEFT + column * CELL + CELL / 2
        where = f'x="{column_center}" y="{shift + TOP - 12}" text-anchor="middle"'
        parts.append(f'<text class="lm-name" {where}>{_short(name)}</text>')
    for index, name in enumerate(panel.rows):
        top = shift + TOP + index * ROW
        css, middle = "lm-soft" if index == 0 else "lm-name", top + ROW / 2 + 4
        parts.append(f'<text class="{css}" x="{LEFT - 10}" y="{middle}" text-anchor="end">{_short(name)}</text>')
        for column, learned_at in enumerate(panel.learned.values()):
            span = high[column] - low[column]
            heat = min(1.0, max(0.0, (losses[index, column] - low[column]) / span)) if span > 0 else 0.0
            learned = None if learned_at is None else learned_at + 1  # rows begin with the untrained model
            parts.append(_cell(losses[:, column], index, learned, heat, LEFT + column * CELL, top))
    return "".join(parts)


def _cell(losses: np.ndarray, row: int, learned: int | None, heat: float, left: int, top: int) -> str:
    box = f'x="{left + 1.5}" y="{top + 1.5}" width="{CELL - 3}" height="{ROW - 3}" rx="4"'
    loss, middle = number(losses[row]), left + CELL / 2
    parts = [f'<rect class="lm-cell" {box}/><rect class="lm-heat" fill-opacity="{0.8 * heat:.3f}" {box}/>']
    if learned == row:
        parts.append(f'<rect class="lm-own" {box}/>')
    if learned is not None and row > learned:
        change = number(losses[row] - losses[learned], sign=True)
        parts.append(f'<text x="{middle}" y="{top + 19}" text-anchor="middle">{loss}</text>')
        parts.append(f'<text class="lm-soft" x="{middle}" y="{top + 35}" text-anchor="middle">{change}</text>')
    else:
        css = "" if learned == row else ' class="lm-not"'
        parts.append(f'<text{css} x="{middle}" y="{top + ROW / 2 + 4}" text-anchor="middle">{loss}</text>')
    return "".join(parts)


def _short(name: str) -> str:
    return escape(shortened(name, 15))
