"""The command `pangu-sigma config`: a configuration with its parameter counts, or every key explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import Json, Overrides
from pangu_sigma.errors import UserError


def config(
    file: Annotated[Path | None, typer.Argument(metavar="FILE.yaml", help="Configuration of the run.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    describe: Annotated[bool, typer.Option("--describe", help="Explain every key instead.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the configurations that are installed.")] = False,
) -> None:
    """Print the whole configuration, what FILE.yaml leaves out filled in and marked, with parameter counts; or explain
    every key."""
    if describe:
        from pangu_sigma.config.config_text import description

        typer.echo(description())
        return
    if listing:
        from pangu_sigma.config.shipped_files import listing as installed

        typer.echo(installed())
        return
    if file is None:
        raise UserError(
            "no configuration is given: name a YAML file, or use --list for installed ones, --describe for all keys"
        )
    from pangu_sigma.config.config_text import json_text, yaml_text
    from pangu_sigma.config.load_config import load_values, read_config
    from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size

    written = read_config(file)
    effective = load_values(written, str(file), overrides or ())  # puts the overrides into what is written
    vocabulary = vocabulary_size(effective)
    typer.echo(json_text(effective, vocabulary) if as_json else yaml_text(effective, vocabulary, written))
