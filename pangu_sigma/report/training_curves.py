"""Which curves the report draws: losses together and per domain, and how the training went."""

import math
from collections.abc import Sequence

from pangu_sigma.report.html_tables import cell
from pangu_sigma.report.line_chart import Chart, ChartLine, line_chart
from pangu_sigma.report.run_data import RunData
from pangu_sigma.report.series import Points, dropped_by_layer, every, pick, smooth, thin

COLOURS = 8
DASHES = 5
LABELLED = 8  # more lines than this get a legend instead of names at their ends
DRAWN_MARKS = 60  # a curve with more points than this is drawn without marks


def loss_overview(run: RunData) -> str:
    """All domains in one chart: held-out loss, or the smoothed training loss of a run that was never evaluated."""
    held_out = bool(run.evaluations)
    lines = []
    for index, domain in enumerate(run.domains):
        points = _validation(run, domain) if held_out else every(smooth(_training(run, domain)))
        style = f"s{index % COLOURS}" + (f" d{index // COLOURS % DASHES}" if index >= COLOURS else "")
        marks = len(run.domains) <= LABELLED and len(points) <= DRAWN_MARKS
        if points:
            lines.append(ChartLine(domain, points, style, marks))
    what = "Held-out loss" if held_out else "Training loss (smoothed)"
    label = f"{what} of {len(lines)} domains over the steps"
    few = len(lines) <= LABELLED
    wide = line_chart(lines, Chart(label, width=1180, height=330, end_labels=few))
    narrow = line_chart(lines, Chart(label, width=360, height=300))
    legend = _legend([(line.label, line.style) for line in lines])
    legend = f'<div class="narrow">{legend}</div>' if few else legend
    return (
        f"<p>{what} per domain over the steps, in nats per token.</p>"
        f'<div class="card">{legend}<div class="wide">{wide}</div><div class="narrow">{narrow}</div></div>'
    )


def domain_panels(run: RunData) -> str:
    """One small chart per domain: training loss as it is and smoothed, held-out points, the unigram model's level."""
    unigram: dict[str, float] = {}
    for evaluation in [*run.evaluations, *([run.final] if run.final else [])]:
        unigram.update(evaluation.unigram)
    panels = []
    for domain in run.domains:
        raw, validation = _training(run, domain), _validation(run, domain)
        level = [("unigram model", unigram[domain])] if domain in unigram else []
        lines = [
            ChartLine("training", every(smooth(raw)), "s0"),
            ChartLine("held-out", validation, "s1", _few(validation)),
        ]
        if len(raw) > 40:  # fewer are not smoothed
            lines.insert(0, ChartLine("training, each record", thin(raw), "s0 raw"))
        last = f", last held-out value {validation[-1][1]:.3f}" if validation else ""
        chart = Chart(f"Loss of domain {domain} over the steps{last}", levels=level)
        panels.append(f'<div class="card"><h3>{cell(domain)}</h3>{line_chart(lines, chart)}</div>')
    entries = [("training (smoothed)", "s0")] if run.train else []
    entries += [("held-out", "s1")] if run.evaluations else []
    entries += [("unigram model", "level")] if unigram else []
    heading = '<p class="next">Each domain by itself:</p>'
    return f'{heading}{_legend(entries)}<div class="cards">{"".join(panels)}</div>'


def training_panels(run: RunData) -> str:
    """Cards with loss, learning rate, gradient norm, speed and, where the run has them, loss scale and others."""
    panels = []
    curves = (
        ("loss", "Training loss of all domains", Chart("Training loss over the steps")),
        ("learning_rate", "Learning rate", Chart("Learning rate over the steps", from_zero=True)),
        ("gradient_norm", "Gradient norm", Chart("Gradient norm over the steps")),
        ("tokens_per_second", "Tokens per second", Chart("Tokens per second over the steps", from_zero=True)),
        ("flops_per_second", "Model FLOP per second", Chart("Model FLOP per second over the steps", from_zero=True)),
        ("loss_scale", "Loss scale", Chart("Loss scale over the steps", log=True)),
        ("auxiliary_loss", "Auxiliary loss", Chart("Auxiliary loss over the steps")),
        ("skipped_steps", "Skipped steps", Chart("Steps skipped so far", from_zero=True)),
    )
    for name, title, chart in curves:
        points = pick(run.train, lambda record, name=name: record.get(name))
        if not points or (name == "skipped_steps" and not any(v for _, v in points)):
            continue
        if name == "gradient_norm" and _spread(points) > 30:
            title, chart = f"{title} (logarithmic)", Chart(chart.label, log=True)
        noisy = name in ("loss", "gradient_norm", "auxiliary_loss", "tokens_per_second") and len(points) > 40
        lines = [ChartLine(title, thin(points), "s0 raw" if noisy else "s0")]
        lines += [ChartLine(f"{title}, smoothed", every(smooth(points)), "s0")] if noisy else []
        panels.append(f'<div class="card"><h3>{title}</h3>{line_chart(lines, chart)}</div>')
    return "".join(panels) + _dropped(run)


def _dropped(run: RunData) -> str:
    curves = dropped_by_layer(run.train)
    if not curves:
        return ""
    title = "<h3>Dropped share of rows, by sparse layer</h3>"
    if not any(value for points in curves.values() for _, value in points):
        return f'<div class="card">{title}<p>No row was dropped.</p></div>'
    styles = [f"s{i % COLOURS}" + (f" d{i // COLOURS % DASHES}" if i >= COLOURS else "") for i in range(len(curves))]
    lines = [ChartLine(layer, every(smooth(p)), s) for (layer, p), s in zip(curves.items(), styles, strict=True)]
    chart = Chart("Dropped share of rows over the steps", from_zero=True, number=lambda v: f"{100 * v:.3g} %")
    return f'<div class="card">{title}{_legend(list(zip(curves, styles, strict=True)))}{line_chart(lines, chart)}</div>'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg width="26" height="8" aria-hidden="true"><line class="{"" if style == "level" else "line "}{style}" '
        f'x1="1" x2="25" y1="4" y2="4"/></svg>{cell(name)}</li>'
        for name, style in entries
    )
    return f'<ul class="legend" tabindex="0">{items}</ul>'


def _training(run: RunData, domain: str) -> Points:
    return pick(run.train, lambda record: (record.get("losses") or {}).get(domain))


def _validation(run: RunData, domain: str) -> Points:
    points = [(e.step, float(e.losses[domain])) for e in run.evaluations if domain in e.losses]
    return points if len(points) <= 400 else thin(points)


def _few(points: Points) -> bool:
    return len(points) <= DRAWN_MARKS


def _spread(points: Points) -> float:
    positive = [v for _, v in points if math.isfinite(v) and v > 0]
    return max(positive) / min(positive) if positive else 1.0
