"""The report's page: its header and the order of its sections, in one self-contained HTML file."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from pangu_sigma.monitor.printable_text import compact, duration, printable_lines
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.monitor.text_tables import number
from pangu_sigma.report import html_tables as tables
from pangu_sigma.report.expert_load_map import SMALL_MAP_CELLS, load_map
from pangu_sigma.report.html_page import html_page
from pangu_sigma.report.html_tables import cell
from pangu_sigma.report.routing_section import routing_section
from pangu_sigma.report.run_data import RunData, load_run
from pangu_sigma.report.series import expert_loads
from pangu_sigma.report.training_curves import domain_panels, loss_overview, training_panels

FILE_NAME = "report.html"


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir/report.html` from the run's files and return its path; the same files give the same bytes.

    Reads `metrics.jsonl` and, where present, `evaluation.json`, `analysis.json`, `summary.json` and `config.yaml`.
    Raises UserError if the folder or its metrics are missing or empty, if a file is damaged, and where it cannot write.
    """
    run_dir = Path(run_dir)
    page = render(load_run(run_dir))
    write_text(run_dir / FILE_NAME, page)
    return run_dir / FILE_NAME


def render(run: RunData) -> str:
    """The page as text. Whatever comes from files is escaped."""
    header = f"<p>{_config_line(run)}</p>{_tiles(run)}"
    return html_page(run.name, "training report", header, _sections(run), _configuration(run))


def _sections(run: RunData) -> Iterator[tuple[str, str, str]]:
    """(anchor, title, HTML) of every section that has something to show."""
    latest = run.latest
    if latest:
        first = run.evaluations[0] if run.evaluations and run.evaluations[0].step < latest.step else None
        note = (
            f"<p>Held-out text at step {latest.step:,}, in nats per token. "
            "The unigram model knows only how frequent each token is.</p>"
        )
        yield "quality", "Quality per domain", note + tables.quality(run.domains, first, latest, _trained_tokens(run))
    if run.final and run.final.matrix:
        note = (
            f"<p>{tables.matrix_verdict(run.final.matrix)} Held-out loss at step {run.final.step:,} in nats per token: "
            "each row is one domain's text, each column the expert group that reads it. Outlined: the row's lowest.</p>"
        )
        yield "matrix", "Domain × group", note + tables.matrix(run.final.matrix)
    if run.train or run.evaluations:
        yield "loss", "Loss", loss_overview(run) + domain_panels(run)
    loads = expert_loads(run.train)
    if loads:
        yield "load", "Expert load", _load_maps(loads)
    if run.analysis:
        yield "routing", "Routing", routing_section(run.analysis)
    panels = training_panels(run)
    if panels:
        yield "training", "Training", f'<div class="cards">{panels}</div>'
    if run.checkpoints:
        yield "checkpoints", "Checkpoints", tables.checkpoints(run.checkpoints)
    if run.events:
        yield "events", "Events", tables.events(run.events)


def _load_maps(loads: dict[str, dict[str, list[int]]]) -> str:
    cells = sum(len(rows) for domains in loads.values() for rows in domains.values())
    note = (
        "<p>Rows each expert took over the mean of its group, in the last quarter of the training records. "
        "Grey is even, blue less, red more; full colour at half and at twice the mean.</p>"
    )
    maps = "".join(
        f'<figure class="card" style="margin:0" tabindex="0"><h3>{cell(layer)}</h3>'
        f"{load_map(layer, domains, tooltips=cells <= SMALL_MAP_CELLS)}</figure>"
        for layer, domains in loads.items()
    )
    return f'{note}<div class="maps">{maps}</div>'


def _tiles(run: RunData) -> str:
    """The figures one looks for first."""
    steps = run.setting("train.steps")
    tiles = [("Step", f"{run.last_step:,}", f"of {steps:,}" if isinstance(steps, int) else "")]
    parameters = run.summary.get("parameters")
    if isinstance(parameters, dict):
        counts = {k: v for k, v in parameters.items() if isinstance(v, int)}
        name = "total" if "total" in counts else next(iter(counts), None)
        if name:
            rest = ", ".join(f"{cell(k).replace('_', ' ')} {compact(v)}" for k, v in counts.items() if k != name)
            tiles.append(("Parameters", compact(counts[name]), rest))
    elif isinstance(parameters, int):
        tiles.append(("Parameters", compact(parameters), ""))
    if run.latest and run.latest.losses:
        gains = [run.latest.unigram[d] - v for d, v in run.latest.losses.items() if d in run.latest.unigram]
        if gains:
            note = f"nats, least of {len(gains)} domains" if len(gains) > 1 else "nats per token"
            tiles.append(("Under unigram", number(min(gains), 2, sign=True), note))
    if run.train:
        last = run.train[-1]
        tiles.append(("Training loss", number(last.get("loss")), "nats per token"))
        tiles.append(("Trained on", compact(sum(_trained_tokens(run).values())), "tokens"))
        speeds = [r["tokens_per_second"] for r in run.train if isinstance(r.get("tokens_per_second"), int | float)]
        flops = [r["flops_per_second"] for r in run.train if isinstance(r.get("flops_per_second"), int | float)]
        if speeds:
            note = f"tokens/s, {compact(median(flops))}FLOP/s" if flops else "tokens/s"
            tiles.append(("Speed (median)", compact(median(speeds)), note))
        seconds = [r["seconds"] for r in run.train if isinstance(r.get("seconds"), int | float)]
        if seconds:
            tiles.append(("Training time", duration(sum(seconds)), "steps only"))
        if last.get("skipped_steps"):
            tiles.append(("Skipped steps", f"{last['skipped_steps']:,}", "not finite"))
    return '<dl class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</dl>"


def _tile(name: str, value: str, note: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"


def _trained_tokens(run: RunData) -> dict[str, int]:
    total: dict[str, int] = {}
    for record in run.train:
        for domain, count in (record.get("tokens") or {}).items():
            total[domain] = total.get(domain, 0) + count
    return total


def _config_line(run: RunData) -> str:
    """The configuration in one line; what is not set is left out."""
    sparse, router = run.setting("model.sparse.layers"), run.setting("model.sparse.router")
    pattern = run.setting("model.sparse.pattern")
    if pattern not in (None, "top"):
        sparse = str(pattern).replace("_", " ")
    of_kinds = f" ({cell(sparse)} sparse, {cell(router)})" if sparse else ""
    if run.setting("model.top_layer"):
        of_kinds = f" (top layer: {cell(run.setting('model.top_layer'))})"
    parts = [
        (run.setting("model.preset"), "preset {}"),
        (run.setting("model.layers"), "{} layers" + of_kinds),
        (run.setting("model.hidden"), "hidden {}"),
        (run.setting("model.heads"), "{} heads"),
        (len(run.domains) or None, "{} domain" + ("s" if len(run.domains) != 1 else "")),
        (run.setting("data.sequence_length"), "sequences of {}"),
        (run.setting("train.batch_size"), "batch {}"),
        (run.setting("optimizer.learning_rate"), "learning rate {}"),
        (run.setting("schedule.kind"), "{}"),
        (run.setting("train.precision"), "{}"),
    ]
    return " · ".join(template.format(cell(value)) for value, template in parts if value is not None)


def _configuration(run: RunData) -> str:
    if not run.config_text:
        return ""
    text = tables.escape(printable_lines(run.config_text.rstrip()))
    return f'<details><summary>Effective configuration</summary><pre tabindex="0">{text}</pre></details>'
