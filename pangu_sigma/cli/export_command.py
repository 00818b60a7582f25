"""The command `pangu-sigma export`; nothing heavy is imported before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from extract.export.export_formats import FORMATS, Options, takers
from pangu_sigma.cli.arguments import ModelPath
from pangu_sigma.cli.next_steps import say_next


def export(
    model: ModelPath,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="For whom: " + ", ".join(f"{name} ({spec.program})" for name, spec in FORMATS.items()) + ".",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to: new or empty.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain", metavar="NAME", help="Domain to take along; may be given several times. All if left out."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help=", ".join(name for name, spec in FORMATS.items() if spec.float32_only is None)
            + ": float32, float16 or bfloat16; each tensor's own if left out. The others write float32.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help=f"{takers('max_shard_bytes')}: largest file of weights, e.g. 500MB or 4GiB."),
    ] = "4GiB",
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help=f"{takers('batch_size')}: samples of the fixed graphs.")
    ] = 1,
    signature: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{takers('signature')}: inputs of the graphs, plain or sigma (Huawei's deployed PanGu-Σ).",
        ),
    ] = "plain",
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help=f"{takers('capacity_factor')}, sigma: rows an expert may take of a window, as a multiple of an even "
            "share; others take the residual alone. Left out, nothing is dropped.",
        ),
    ] = None,
) -> None:
    """Export a model to another program's format, with its tokenizer."""
    from extract.export.export_job import export as write
    from pangu_sigma.checkpoint.file_size import parse_size

    options = Options(dtype, parse_size(max_shard_size), batch_size, signature, capacity_factor)
    for sentence in write(model, out, format_, domain, options).messages:
        typer.echo(sentence)
    typer.echo(out)
    say_next("export", out)
