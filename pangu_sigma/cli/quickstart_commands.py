"""The commands `pangu-sigma corpora` and `quickstart`: each imports its job when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import ConfigFile, Overrides
from pangu_sigma.cli.next_steps import say_next


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

    finished = run_quickstart(config)
    if finished is not None:
        from extract.quickstart_extraction import cut_out_and_show

        cut_out_and_show(finished, config.run.device)
        say_next("run", finished.folder, config.domain_names)
