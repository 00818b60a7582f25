"""The commands `pangu-sigma corpora` and `quickstart`: each imports its job when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pangu_sigma.cli.arguments import ConfigFile, Overrides
from pangu_sigma.cli.next_steps import end_stopped, say_next

if TYPE_CHECKING:
    from pangu_sigma.quickstart import Quickstart


def corpora(out: Annotated[Path, typer.Option(help="Folder to write to, one .jsonl file per domain.")]) -> None:
    """Build the quickstart's four domains from what this machine has; nothing is downloaded."""
    from pangu_sigma.data.builtin_corpora import build

    for path in build(out).values():
        typer.echo(path)
    say_next("quickstart corpora" if out.resolve() == Path("build/quickstart").resolve() else "corpora", out)


def quickstart(
    file: ConfigFile = Path("configs/quickstart.yaml"),
    overrides: Overrides = None,
) -> None:
    """Train on the quickstart's domains and show what came of it: table, samples, report, a domain cut out."""
    from pangu_sigma.config import load_config

    config = load_config(file, overrides or ())
    from pangu_sigma.quickstart import quickstart as run_quickstart

    done = run_quickstart(config)
    if done.evaluation is None:
        typer.echo(f"stopped at step {done.step} of {done.steps}")
        stops = ["train.stop_at=null"] if config.train.stop_at else []
        say_next("unfinished quickstart", done.folder, again=["quickstart", file, *(overrides or ()), *stops])
        end_stopped(done.stop_signal)
        return
    _print_figures(done)
    from extract.extraction_summary import summary_text
    from extract.quickstart_extraction import cut_out_first

    extraction, sample = cut_out_first(done, config.run.device)
    domain, out = extraction.domains[0], extraction.path
    typer.echo(f"\n--- {domain}: cut out of the model\n")
    typer.echo(summary_text(extraction, out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out))
    _print_sample(f"{domain}: the same beginning ▸ and what the sub-model writes on", sample)
    say_next("run", done.folder, config.domain_names)


def _print_figures(done: Quickstart) -> None:
    from pangu_sigma.monitor.text_tables import matrix_table, quality_table

    result = done.evaluation
    typer.echo("\nHeld-out loss in nats per token\n")
    typer.echo(quality_table(result.unigram, result.losses, done.before, result.tokens))
    typer.echo("\nLoss of a domain's text (row) under a domain's experts (column)\n")
    typer.echo(matrix_table(result.matrix))
    for domain, sample in done.samples.items():
        _print_sample(f"{domain}: a held-out beginning ▸ and what the model writes on", sample)
    typer.echo(f"\nReport: {done.report}")
    typer.echo(f"Run:    {done.folder}")


def _print_sample(title: str, sample: tuple[str, str]) -> None:
    from pangu_sigma.monitor.printable_text import printable_lines

    typer.echo(f"\n--- {title}\n")
    typer.echo(printable_lines("▸".join(sample)))
