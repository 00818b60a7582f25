"""The command `pangu-sigma doctor`; nothing heavy is imported before it is called."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import Json

FAILED = 1


def doctor(
    count: Annotated[int, typer.Option("--processes", min=2, max=64, help="Processes that meet in an all-to-all.")] = 2,
    seconds: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds that a check may take.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, kernels, a training step, an all-to-all; devices against the CPU.

    Ends with code 1 if a check failed. Without an NPU its rows are skipped.
    """
    from pangu_sigma.doctor.check_results import as_json as rows_as_json
    from pangu_sigma.doctor.check_results import healthy
    from pangu_sigma.doctor.check_table import text
    from pangu_sigma.doctor.machine_checks import examine
    from pangu_sigma.monitor.progress import progress

    checks = []
    with progress("examine", None, unit="checks") as job:
        for check in examine(count, seconds):
            checks.append(check)
            job.advance(1)
    typer.echo(json.dumps(rows_as_json(checks), ensure_ascii=False, indent=2) if as_json else text(checks))
    if not healthy(checks):
        raise typer.Exit(FAILED)
