"""Expert load as heat maps: for each sparse layer one row per domain, one cell per expert."""

import math
from html import escape

from pangu_sigma.monitor.printable_text import printable, shortened

ROW = 24
LABEL = 118
NOTE = 62
SMALL_MAP_CELLS = 3000


def load_map(layer: str, loads: dict[str, list[int]], tooltips: bool = True) -> str:
    """SVG of one layer's loads (domain → rows per expert). A cell is an expert's rows over its group's mean: 1 is even.

    Blue is less, red is more, full colour at a half or at twice the mean; the busiest expert's value is at the right.
    """
    widest = max((len(rows) for rows in loads.values()), default=1) or 1
    cell = min(38.0, max(7.0, 250 / widest))
    width, height = LABEL + cell * widest + NOTE, ROW * len(loads) + 20
    name = escape(printable(layer))
    label = f"Rows per expert over the group's mean in {name}: " + "; ".join(
        f"{escape(printable(domain))}: busiest {_ratio(max(ratios)) if ratios else 'no rows'}"
        for domain, ratios in ((d, over_mean(rows)) for d, rows in loads.items())
    )
    parts = [f'<svg class="heat" width="{width:.0f}" height="{height}" role="img" aria-label="{label}">']
    parts.append(f'<text class="tick" x="{width - 2:.0f}" y="12" text-anchor="end">busiest</text>')
    parts.append(f'<text class="tick" x="{LABEL}" y="12">experts 0…{widest - 1}</text>')
    for index, (domain, rows) in enumerate(loads.items()):
        parts.append(_row(domain, rows, 20 + index * ROW, cell, width, tooltips))
    return "".join(parts) + "</svg>"


def over_mean(rows: list[int]) -> list[float]:
    """Each expert's rows over the mean of its group; empty if the group got no row."""
    total = sum(rows)
    return [n * len(rows) / total for n in rows] if total else []


def _row(domain: str, rows: list[int], top: float, cell: float, width: float, tooltips: bool) -> str:
    name, short = printable(domain), shortened(domain, 16)
    middle = top + ROW / 2 + 3
    parts = [f'<text class="name" x="{LABEL - 8}" y="{middle}" text-anchor="end">{escape(short)}</text>']
    ratios = over_mean(rows)
    if not ratios:
        parts.append(f'<text class="tick" x="{LABEL}" y="{middle}">no rows</text>')
    gap = 2 if cell > 12 else 1
    for index, ratio in enumerate(ratios):
        left = LABEL + index * cell
        amount = min(1.0, abs(math.log2(ratio))) if ratio else 1.0
        title = f"<title>{escape(name)}, expert {index}: {ratio:.2f} × mean, {rows[index]:,} rows</title>"
        box = f'x="{left:.1f}" y="{top + 1}" width="{cell - gap:.1f}" height="{ROW - 3}" rx="2"'
        parts.append(f'<rect class="even" {box}/>')
        parts.append(
            f'<rect class="{"over" if ratio > 1 else "under"}" fill-opacity="{0.75 * amount:.2f}" {box}>'
            f"{title if tooltips else ''}</rect>"
        )
        if cell >= 30:
            center = left + (cell - gap) / 2
            parts.append(f'<text class="value" x="{center:.1f}" y="{middle}" text-anchor="middle">{ratio:.2f}</text>')
    if ratios:
        note = _ratio(max(ratios))
        parts.append(f'<text class="name" x="{width - 2:.0f}" y="{middle}" text-anchor="end">{note}</text>')
    return "".join(parts)


def _ratio(value: float) -> str:
    return f"{value:.2f} ×"
