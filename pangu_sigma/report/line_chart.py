"""ChartLine charts as SVG text. Colours are CSS classes, so that one chart serves light and dark pages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pangu_sigma.monitor.printable_text import compact, printable, shortened
from pangu_sigma.report.series import Points

# px of the viewBox around the plot
LEFT, TOP, BOTTOM, RIGHT, LABELS = 50, 12, 24, 12, 118


@dataclass(frozen=True)
class ChartLine:
    """A curve: `style` holds CSS classes; `marks` draws its points with their values as tooltips."""

    label: str
    points: Points
    style: str = "s0"
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """How a chart looks: `levels` are dashed horizontal lines (label, value); `log` gives a logarithmic axis."""

    label: str
    width: int = 380
    height: int = 216
    log: bool = False
    from_zero: bool = False
    end_labels: bool = False
    levels: Sequence[tuple[str, float]] = ()
    number: Callable[[float], str] | None = None


def line_chart(lines: Sequence[ChartLine], chart: Chart) -> str:
    """SVG of the lines over steps. A value that is not finite breaks its line and shows as a cross at the top edge."""
    finite = [(x, y) for line in lines for x, y in line.points if _drawable(y, chart.log)]
    steps = [x for line in lines for x, _ in line.points]
    levels = [(name, v) for name, v in chart.levels if _drawable(v, chart.log)]
    values = [y for _, y in finite] + [v for _, v in levels]
    if not steps:
        return '<p class="none">No values.</p>'
    number = chart.number or tick
    right = chart.width - (LABELS if chart.end_labels else RIGHT)
    x = _Scale(min(steps), max(steps), LEFT, right)
    y = _value_scale(values or [1.0], chart)
    parts = [
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{_text(chart.label)}">'
    ]
    for value in y.ticks(5):
        offset = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{offset:.1f}" y2="{offset:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{offset + 3.6:.1f}" text-anchor="end">{_text(number(value))}</text>'
        )
    base = chart.height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
    one = min(steps) == max(steps)
    x_ticks = steps[:1] if one else [v for v in x.ticks(max(2, (right - LEFT) // 70)) if v == int(v)]
    for value in x_ticks:
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{base + 16}" text-anchor="middle">{tick(value)}</text>')
    for name, value in levels:
        offset = y(value)
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{right}" y1="{offset:.1f}" y2="{offset:.1f}">'
            f"<title>{_text(name)}: {_text(number(value))}</title></line>"
        )
    for line in lines:
        parts.extend(_line(line, x, y, chart.log, number))
    if chart.end_labels:
        parts.extend(_end_labels(lines, y, chart, right))
    return "".join(parts) + "</svg>"


def tick(value: float) -> str:
    """A short number for an axis: 0, 0.25, 3, 1.5k, 20M, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return compact(value).replace(".0", "")
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.replace('.0', '')}e{int(exponent)}"
    return f"{value:.4g}"


class _Scale:
    """A linear map of values onto pixels; one value alone sits in the middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high == low:
            margin = abs(low) / 2 or 1.0
            low, high = low - margin, high + margin
        self.low, self.high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self, count: int) -> list[float]:
        rough = (self.high - self.low) / max(1, count)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next((power * m for m in (1, 2, 2.5, 5) if power * m >= rough * 0.999), power * 10)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


class _LogScale(_Scale):
    """A logarithmic map; ticks at powers of ten, or at 1, 2, 5 of each if there are few powers."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        super().__init__(math.log10(low), math.log10(high), start, end)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(value))

    def ticks(self, count: int) -> list[float]:
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1, 2, 5), (1,)):
            values = [f * 10.0**p for p in powers for f in factors]
            values = [v for v in values if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
            if len(values) <= count + 2:
                return values
        return values[:: math.ceil(len(values) / count)]


def _value_scale(values: list[float], chart: Chart) -> _Scale:
    low, high = min(values), max(values)
    if chart.log:
        return _LogScale(low / 1.3, high * 1.3, chart.height - BOTTOM, TOP)
    if chart.from_zero:
        return _Scale(0.0, high * 1.05 or 1.0, chart.height - BOTTOM, TOP)
    margin = (high - low) * 0.06
    return _Scale(low - margin, high + margin, chart.height - BOTTOM, TOP)


def _line(line: ChartLine, x: _Scale, y: _Scale, log: bool, number: Callable[[float], str]) -> list[str]:
    parts, run, crosses = [], [], []
    runs = []
    for step, value in line.points:
        if _drawable(value, log):
            run.append((step, value))
            continue
        crosses.append((step, value))
        if run:
            runs.append(run)
        run = []
    runs += [run] if run else []
    name = _text(line.label)
    for run in runs:
        if len(run) > 1:
            path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in run)
            parts.append(
                f'<path class="line {line.style}" d="{path}"><title>{name}: {number(run[-1][1])}</title></path>'
            )
        for a, b in run if line.marks or len(run) == 1 else ():
            title = f"<title>{name}, step {a:,}: {number(b)}</title>"
            parts.append(f'<circle class="mark {line.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3">{title}</circle>')
    for step, value in crosses:
        title = f"<title>{name}, step {step:,}: {value}</title>"
        parts.append(f'<text class="cross" x="{x(step):.1f}" y="{TOP + 2}" text-anchor="middle">×{title}</text>')
    return parts


def _end_labels(lines: Sequence[ChartLine], y: _Scale, chart: Chart, right: int) -> list[str]:
    """Names beside the lines' ends, moved apart where they would overlap."""
    ends = [(y(p[-1]), line) for line in lines if (p := [b for _, b in line.points if _drawable(b, chart.log)])]
    parts, free = [], -math.inf
    gap = 14.0
    overflow = len(ends) * gap - (chart.height - BOTTOM)
    for offset, line in sorted(ends, key=lambda end: end[0]):
        latest = chart.height - BOTTOM - gap * (len(ends) - 1 - len(parts)) + max(0.0, overflow)
        free = max(free, min(offset, latest))
        name = escape(shortened(line.label, 15))
        parts.append(
            f'<text class="end {line.style}" x="{right + 7}" y="{free + 4:.1f}">{name}</text>'
            f'<line class="lead {line.style}" x1="{right + 1}" y1="{offset:.1f}" x2="{right + 5}" y2="{free:.1f}"/>'
        )
        free += gap
    return parts


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _text(text: str) -> str:
    return escape(printable(text))
