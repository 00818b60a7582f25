"""Curves over the steps of a run, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise, product
from typing import TYPE_CHECKING

from pangu_sigma.monitor.printable_text import compact, shortened
from pangu_sigma.report.series import Points, every
from pangu_sigma.report.svg_figure import Picture, colour, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# px round the plot; LABELS: at the right where the lines' names stand there
LEFT, TOP, BOTTOM, RIGHT, LABELS = 50, 12, 24, 12, 118
LABEL_HEIGHT = 14
DASHES = ("", "7 4", "2 4", "9 3 2 3", "14 4")
STEPS = (1, 2, 2.5, 5, 10)  # what the distance of ticks begins with
TABLE_ROWS = 12
DRAWN_MARKS = 60  # a curve with more points is drawn without marks
LARGEST = 1e300  # an axis of larger values would overflow


@dataclass(frozen=True)
class ChartLine:
    """A curve: `style` as `line_styles` gives it (colour, dashes); `marks` draws its points, a `faint`
    one lies behind the next, which is the same smoothed."""

    label: str
    points: Points
    style: tuple[str, str] = ("s0", "")
    marks: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """How a chart looks, in px: `levels` are dashed horizontal lines (label, value); `log` gives a logarithmic axis;
    `end_labels` writes the names at the lines' ends."""

    label: str
    width: int = 380
    height: int = 216
    log: bool = False
    from_zero: bool = False
    end_labels: bool = False
    levels: Sequence[tuple[str, float]] = ()
    number: Callable[[float], str] | None = None


def line_styles(count: int) -> list[tuple[str, str]]:
    """(colour, dashes) of `count` lines: eight colours, then the same dashed."""
    return list(islice(cycle((f"s{i}", dashes) for dashes, i in product(DASHES, range(8))), count))


def line_chart(lines: Sequence[ChartLine], chart: Chart) -> Picture:
    """The lines over steps, and their values at some steps. A value that is not finite breaks its line and shows as a
    cross at the top edge, and in the table."""
    number = chart.number or tick
    shown = [line for line in lines if line.points]
    svg = draw_svg(chart.label, chart.width, chart.height, lambda figure: _draw(figure, shown, chart, number))
    # A faint line is what was recorded; its smoothed curve, which comes next, adds nothing to the table.
    named = [line for before, line in pairwise([None, *shown]) if before is None or not before.faint]
    rows = [
        [f"{step:,}", *("–" if value is None else number(value) for value in values)]
        for step, values in _table([line.points for line in named])
    ]
    return Picture(svg, ["Step", *(line.label for line in named)], rows)


def tick(value: float) -> str:
    """A short number for an axis: 0, 0.25, 3, 1.5k, 20M, 3e-4."""
    if abs(value) >= 1000 or not math.isfinite(value):
        return compact(value).replace(".0", "")
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _draw(figure: Figure, lines: Sequence[ChartLine], chart: Chart, number: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    width, height = chart.width, chart.height
    plot = width - LEFT - (LABELS if chart.end_labels else RIGHT)
    axes = figure.add_axes((LEFT / width, BOTTOM / height, plot / width, (height - BOTTOM - TOP) / height))
    for line in lines:
        _draw_line(axes, line, chart.log)
    for _, value in chart.levels:
        axes.axhline(value, color=colour("faint"), linewidth=1.5, dashes=(5, 4))
    values = [y for line in lines for _, y in line.points if _drawable(y, chart.log)]
    axes.xaxis.set_major_locator(MaxNLocator(max(2, plot // 70), steps=STEPS, integer=True))
    if chart.log and values:
        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=7))
        axes.set_ylim(min(values) / 1.3, max(values) * 1.3)
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        if chart.from_zero:
            axes.set_ylim(0, max(values, default=0) * 1.05 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if chart.end_labels:
        _write_end_labels(axes, lines, chart)


def _draw_line(axes: Axes, line: ChartLine, log: bool) -> None:
    drawable = [_drawable(y, log) for _, y in line.points]
    steps = [x for x, _ in line.points]
    values = [y if good else math.nan for (_, y), good in zip(line.points, drawable, strict=True)]
    # A point without neighbours would be no line.
    around = [False, *drawable, False]
    marks = line.marks and len(values) <= DRAWN_MARKS
    marked = [i for i, good in enumerate(drawable) if good and (marks or not (around[i] or around[i + 2]))]
    name, dashes = line.style
    style = {"color": colour(name), "marker": "o", "markersize": 6, "markeredgewidth": 0, "markevery": marked}
    if dashes:
        style["dashes"] = [float(length) for length in dashes.split()]
    axes.plot(steps, values, linewidth=1 if line.faint else 2, alpha=0.3 if line.faint else 1, **style)
    for step, _ in every([point for point, good in zip(line.points, drawable, strict=True) if not good], DRAWN_MARKS):
        where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "center"}
        axes.text(step, 1, "×", color=colour("bad"), weight="bold", **where)


def _write_end_labels(axes: Axes, lines: Sequence[ChartLine], chart: Chart) -> None:
    """Names beside the lines' ends, moved apart where they would overlap."""
    axes.autoscale_view()
    ends = [(line, ends[-1]) for line in lines if (ends := [p for p in line.points if _drawable(p[1], chart.log)])]
    ends = sorted(((axes.transData.transform(point)[1], line, point) for line, point in ends), key=lambda end: -end[0])
    free = chart.height - LABEL_HEIGHT / 2
    for index, (height, line, point) in enumerate(ends):
        lowest = BOTTOM + LABEL_HEIGHT * (len(ends) - 1 - index)
        free = min(free, max(height, lowest))
        name = colour(line.style[0])
        axes.annotate(
            shortened(line.label, 15), point, (chart.width - LABELS + 9, free), textcoords="figure pixels", color=name,
            va="center", arrowprops={"arrowstyle": "-", "color": name, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        free -= LABEL_HEIGHT


def _table(curves: Sequence[Points]) -> list[tuple[int, list[float | None]]]:
    """(step, value of each curve) at about TABLE_ROWS steps, and where something is not finite."""
    by_step: dict[int, list[float | None]] = {}
    for column, points in enumerate(curves):
        for step, value in points:
            by_step.setdefault(step, [None] * len(curves))[column] = value
    kept = {step for step, _ in every(sorted((step, 0.0) for step in by_step), TABLE_ROWS)}
    broken = [s for s, row in by_step.items() if any(v is not None and not math.isfinite(v) for v in row)]
    return [(step, by_step[step]) for step in sorted(kept | set(broken[:TABLE_ROWS]))]


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST and (value > 0 or not log)
