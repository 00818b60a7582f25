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
) -> None:
    """Print the effective configuration with parameter counts, or explain every key."""
    if describe:
        from pangu_sigma.config.config_text import description

        typer.echo(description())
        return
    if file is None:
        raise UserError("no configuration is given: name a YAML file, or use --describe for a list of all keys")
    from pangu_sigma.config import load_config
    from pangu_sigma.config.config_text import json_text, yaml_text
    from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size

    effective = load_config(file, overrides or ())
    to_text = json_text if as_json else yaml_text
    typer.echo(to_text(effective, vocabulary_size(effective)))
