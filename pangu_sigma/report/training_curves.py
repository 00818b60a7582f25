"""Which curves the report draws: losses together and per domain, and how the training went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pangu_sigma.report.line_chart import Chart, ChartLine, line_chart, line_styles
from pangu_sigma.report.run_data import RunData
from pangu_sigma.report.series import Points, dropped_by_layer, every, pick, smooth
from pangu_sigma.report.svg_figure import Picture

LABELLED = 8  # more lines than this get a legend instead of names at their ends
SMOOTHED = 40  # curves of fewer points are drawn as they are

# key of a training record: title, how it is drawn, whether it is smoothed
CURVES: Mapping[str, tuple[str, dict[str, Any], bool]] = {
    "loss": ("Training loss of all domains", {}, True),
    "learning_rate": ("Learning rate", {"from_zero": True}, False),
    "gradient_norm": ("Gradient norm", {}, True),
    "tokens_per_second": ("Tokens per second", {"from_zero": True}, True),
    "flops_per_second": ("Model FLOP per second", {"from_zero": True}, False),
    "loss_scale": ("Loss scale", {"log": True}, False),
    "auxiliary_loss": ("Auxiliary loss", {}, True),
    "skipped_steps": ("Skipped steps", {"from_zero": True}, False),
}


def loss_curves(run: RunData) -> dict[str, Any]:
    """All domains in one chart (`wide` and `narrow`): held-out loss, or the smoothed training loss of a run that was
    never evaluated. And a chart per domain (`panels`): training loss as it is and smoothed, held-out points, the
    unigram model's level. With the entries of their legends."""
    held_out, few = bool(run.evaluations), len(run.domains) <= LABELLED
    what = "Held-out loss" if held_out else "Training loss (smoothed)"
    lines = [
        ChartLine(domain, points, style, marks=few)
        for domain, style in zip(run.domains, line_styles(len(run.domains)), strict=True)
        if (points := _held_out(run, domain) if held_out else every(smooth(_training(run, domain))))
    ]
    label = f"{what} of {len(lines)} domains over the steps"
    unigram: dict[str, float] = {}
    for evaluation in [*run.evaluations, *([run.final] if run.final else [])]:
        unigram.update(evaluation.unigram)
    entries = [("training (smoothed)", ("s0", ""))] if run.train else []
    entries += [("held-out", ("s1", ""))] if run.evaluations else []
    entries += [("unigram model", ("faint", "5 4"))] if unigram else []
    return {
        "what": what,
        "few": few,
        "entries": [(line.label, line.style) for line in lines],
        "wide": line_chart(lines, Chart(label, width=1180, height=330, end_labels=few)),
        "narrow": line_chart(lines, Chart(label, width=360, height=300)),
        "panel_entries": entries,
        "panels": [(domain, _domain_panel(run, domain, unigram.get(domain))) for domain in run.domains],
    }


def training_panels(run: RunData) -> Iterator[tuple[str, Picture | None, list]]:
    """(title, chart, entries of its legend) of loss, learning rate, gradient norm, speed and, where the run has them,
    loss scale and others; the chart is None where no row was dropped."""
    for key, (title, options, noisy) in CURVES.items():
        points = pick(run.train, lambda record, key=key: record.get(key))
        if not points or (key == "skipped_steps" and not any(v for _, v in points)):
            continue
        label = f"{title} over the steps"
        if key == "gradient_norm" and _spread(points) > 30:
            title, options = f"{title} (logarithmic)", {"log": True}
        yield title, line_chart(_lines(title, points, noisy), Chart(label, **options)), []
    curves = dropped_by_layer(run.train)
    if curves:
        styles = line_styles(len(curves))
        lines = [ChartLine(layer, every(smooth(p)), s) for (layer, p), s in zip(curves.items(), styles, strict=True)]
        chart = Chart("Dropped share of rows over the steps", from_zero=True, number=lambda v: f"{100 * v:.3g} %")
        dropped = any(value for points in curves.values() for _, value in points)
        picture = line_chart(lines, chart) if dropped else None
        yield "Dropped share of rows, by sparse layer", picture, list(zip(curves, styles, strict=True))


def _domain_panel(run: RunData, domain: str, unigram: float | None) -> Picture:
    held_out = _held_out(run, domain)
    last = f", last held-out value {held_out[-1][1]:.3f}" if held_out else ""
    levels = [] if unigram is None else [("unigram model", unigram)]
    lines = _lines("training", _training(run, domain), True)
    lines.append(ChartLine("held-out", held_out, ("s1", ""), marks=True))
    return line_chart(lines, Chart(f"Loss of domain {domain} over the steps{last}", levels=levels))


def _lines(name: str, points: Points, noisy: bool) -> list[ChartLine]:
    """A curve; of a long noisy one what was recorded, faint, and the smoothed curve."""
    if not noisy or len(points) <= SMOOTHED:
        return [ChartLine(name, points)]
    return [ChartLine(name, points, faint=True), ChartLine(f"{name} (smoothed)", every(smooth(points)))]


def _training(run: RunData, domain: str) -> Points:
    return pick(run.train, lambda record: record["losses"].get(domain))


def _held_out(run: RunData, domain: str) -> Points:
    return [(e.step, float(e.losses[domain])) for e in run.evaluations if domain in e.losses]


def _spread(points: Points) -> float:
    positive = [v for _, v in points if math.isfinite(v) and v > 0]
    return max(positive) / min(positive) if positive else 1.0
