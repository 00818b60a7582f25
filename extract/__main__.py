"""`python -m extract MODEL`: list the domains of a run or checkpoint and what each of them owns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def extract(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run's folder or one of its checkpoints.")],
) -> None:
    """List the domains of a checkpoint: experts per sparse layer, parameters, bytes and files of each."""
    from extract.listing import list_domains
    from pangu_sigma.monitor.tables import text_table

    try:
        listings = list_domains(model)
    except UserError as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    rows = [
        [d.name, " ".join(str(n) for n in d.experts.values()), f"{d.parameters:,}", f"{d.bytes:,}", " ".join(d.files)]
        for d in listings
    ]
    typer.echo(text_table(["domain", "experts", "parameters", "bytes", "files"], rows))


if __name__ == "__main__":
    app(prog_name="python -m extract")
