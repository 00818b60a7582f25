"""The report of a run: which sections its page has, with their data, in one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pangu_sigma.monitor.printable_text import compact, duration
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.monitor.text_tables import best_of_row, measured_part, number
from pangu_sigma.report.expert_load_map import load_map
from pangu_sigma.report.html_page import render_page
from pangu_sigma.report.routing_tables import routing_tables
from pangu_sigma.report.run_data import RunData, load_run
from pangu_sigma.report.series import expert_loads
from pangu_sigma.report.training_curves import loss_curves, training_panels
from pangu_sigma.wording import listed

FILE_NAME = "report.html"


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir/report.html` from the run's files and return its path; the same files give the same bytes.

    Reads `metrics.jsonl` and, where present, `evaluation.json`, `analysis.json`, `summary.json` and `config.yaml`.
    Raises UserError if the folder or its metrics are missing or empty, if a file is damaged, and where it cannot write.
    """
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    page = render_page(
        "report/report_page.html", title=run.name, sections=_sections(run), run=run, tiles=_tiles(run)
    )
    write_text(run_dir / FILE_NAME, page)
    return run_dir / FILE_NAME


def _sections(run: RunData) -> Iterator[tuple[str, str, Any]]:
    """(anchor, title, data for the template) of every section that has something to show."""
    if run.latest:
        first = run.evaluations[0] if run.evaluations and run.evaluations[0].step < run.latest.step else None
        part = measured_part(run.latest.batches)
        yield "quality", "Quality per domain", {"first": first, "tokens": run.trained_tokens, "part": part}
    if run.final and run.final.matrix:
        yield "matrix", "Domain × group", {**_matrix(run.final.matrix), "part": measured_part(run.final.batches)}
    if run.train or run.evaluations:
        yield "loss", "Loss", loss_curves(run)
    loads = expert_loads(run.train)
    if loads:
        yield "load", "Expert load", [(layer, load_map(layer, domains)) for layer, domains in loads.items()]
    if run.analysis:
        yield "routing", "Routing", routing_tables(run.analysis)
    panels = list(training_panels(run))
    if panels:
        yield "training", "Training", panels
    if run.checkpoints:
        yield "checkpoints", "Checkpoints", run.checkpoints
    if run.events:
        yield "events", "Events", run.events


def _matrix(losses: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Columns of the matrix, the lowest of each row, how strongly each cell is coloured, and how many domains do best
    under their own experts as a sentence."""
    best = {domain: best_of_row(row) for domain, row in losses.items()}
    others = [f"{d} ({listed(best[d]) or 'none'})" for d in losses if d not in best[d]]
    count = f"{len(losses) - len(others)} of {len(losses)} domains do best under their own experts"
    return {
        "groups": list(dict.fromkeys(group for row in losses.values() for group in row)),
        "best": best,
        "strengths": {domain: _strengths(row) for domain, row in losses.items()},
        "verdict": f"{count}; better under another's: {', '.join(others)}."
        if others
        else "Every domain does best under its own experts.",
    }


def _strengths(row: Mapping[str, float]) -> dict[str, float]:
    """Group -> how strongly its cell is coloured (0..0.62), more the nearer the row's lowest loss."""
    finite = {group: v for group, v in row.items() if math.isfinite(v)}
    low, high = min(finite.values(), default=0.0), max(finite.values(), default=0.0)
    return {group: 0.62 * (1 - (v - low) / ((high - low) or 1.0)) ** 2 for group, v in finite.items()}


def _tiles(run: RunData) -> Iterator[tuple[str, str, str]]:
    """(name, value, note) of the figures one looks for first."""
    steps = run.setting("train.steps")
    yield "Step", f"{run.last_step:,}", f"of {steps:,}" if isinstance(steps, int) else ""
    parameters = run.summary.get("parameters")
    counts = parameters if isinstance(parameters, dict) else {"total": parameters}
    counts = {key: value for key, value in counts.items() if isinstance(value, int)}
    if counts:
        total = "total" if "total" in counts else next(iter(counts))
        rest = ", ".join(f"{key.replace('_', ' ')} {compact(v)}" for key, v in counts.items() if key != total)
        yield "Parameters", compact(counts[total]), rest
    gains = list(run.latest.gains.values()) if run.latest else []
    if gains:
        note = f"nats, least of {len(gains)} domains" if len(gains) > 1 else "nats per token"
        yield "Gain on unigram", number(min(gains), 2, sign=True), note
    if not run.train:
        return
    yield "Training loss", number(run.train[-1].get("loss")), "nats per token"
    yield "Trained on", compact(sum(run.trained_tokens.values())), "tokens"
    speeds, flops, seconds = (
        [record[key] for record in run.train if isinstance(record.get(key), int | float)]
        for key in ("tokens_per_second", "flops_per_second", "seconds")
    )
    if speeds:
        note = f"tokens/s, {compact(median(flops))}FLOP/s" if flops else "tokens/s"
        yield "Speed (median)", compact(median(speeds)), note
    if seconds:
        yield "Training time", duration(sum(seconds)), "steps only"
    if run.train[-1].get("skipped_steps"):
        yield "Skipped steps", f"{run.train[-1]['skipped_steps']:,}", "not finite"
