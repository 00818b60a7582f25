"""The matrix as a heat map: one SVG that stands alone, for light and dark pages."""

from __future__ import annotations

from html import escape

import numpy as np

from pangu_sigma.lifelong.results import Results
from pangu_sigma.monitor.tables import number
from pangu_sigma.monitor.text import printable

CELL, ROW, TOP, LEFT = 104, 46, 34, 132

_STYLE = """
.lm text{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,Arial,"Noto Sans","PingFang SC",sans-serif;fill:#141413;
font-variant-numeric:tabular-nums}
.lm .lm-soft{fill:#6b6963;font-size:11px}.lm .lm-name{font-weight:600}.lm .lm-cell{fill:#eeede8}
.lm .lm-heat{fill:#e34948}.lm .lm-own{fill:none;stroke:#2a78d6;stroke-width:2}
@media (prefers-color-scheme:dark){.lm text{fill:#f5f4f0}.lm .lm-soft{fill:#a5a39b}.lm .lm-cell{fill:#30302e}
.lm .lm-heat{fill:#e66767}.lm .lm-own{stroke:#3987e5}}
"""


def heat_map(results: Results) -> str:
    """SVG of the losses, a row per stage and a column per domain.

    Colour: how far a loss lies above the column's lowest, full at the untrained model's. Outlined: the stage that
    learned the domain; under it, the change since then.
    """
    rows, domains = results.named_rows(), results.domains
    losses = np.array([[row[name]["loss"] for name in domains] for _, row in rows])
    width, height = LEFT + CELL * len(domains) + 4, TOP + ROW * len(rows) + 4
    said = f"Held-out loss of {len(domains)} domains after each of {len(rows) - 1} stages"
    parts = [
        f'<svg class="lm" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{said}"><style>{_STYLE}</style>'
    ]
    parts.append(f'<text class="lm-soft" x="{LEFT - 10}" y="{TOP - 12}" text-anchor="end">after stage</text>')
    for column, name in enumerate(domains):
        at = LEFT + column * CELL + CELL / 2
        parts.append(f'<text class="lm-name" x="{at}" y="{TOP - 12}" text-anchor="middle">{_short(name)}</text>')
    low, high = losses.min(axis=0), losses.max(axis=0)
    for index, (name, _) in enumerate(rows):
        top = TOP + index * ROW
        css = "lm-soft" if index == 0 else "lm-name"
        middle = top + ROW / 2 + 4
        parts.append(f'<text class="{css}" x="{LEFT - 10}" y="{middle}" text-anchor="end">{_short(name)}</text>')
        for column, domain in enumerate(domains):
            loss = losses[index, column]
            span = high[column] - low[column]
            heat = (loss - low[column]) / span if span > 0 else 0.0
            parts.append(_cell(results, losses, index, column, domain, heat))
    return "".join(parts) + "</svg>\n"


def _cell(results: Results, losses: np.ndarray, row: int, column: int, domain: str, heat: float) -> str:
    left, top = LEFT + column * CELL, TOP + row * ROW
    box = f'x="{left + 1.5}" y="{top + 1.5}" width="{CELL - 3}" height="{ROW - 3}" rx="4"'
    at = results.learned[domain]
    learned = None if at is None else at + 1  # rows begin with the untrained model
    loss, middle = number(losses[row, column]), left + CELL / 2
    parts = [f'<rect class="lm-cell" {box}/><rect class="lm-heat" fill-opacity="{0.8 * heat:.3f}" {box}/>']
    if learned == row:
        parts.append(f'<rect class="lm-own" {box}/>')
    if learned is not None and row > learned:
        change = number(losses[row, column] - losses[learned, column], sign=True)
        parts.append(f'<text x="{middle}" y="{top + 20}" text-anchor="middle">{loss}</text>')
        parts.append(f'<text class="lm-soft" x="{middle}" y="{top + 36}" text-anchor="middle">{change}</text>')
    else:
        css = "" if learned == row else ' class="lm-soft"'
        parts.append(f'<text{css} x="{middle}" y="{top + ROW / 2 + 4}" text-anchor="middle">{loss}</text>')
    return "".join(parts)


def _short(name: str) -> str:
    name = printable(name)
    return escape(name if len(name) <= 16 else name[:15] + "…")
