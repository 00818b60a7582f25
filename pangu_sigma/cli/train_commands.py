"""The commands `pangu-sigma train` and `mindformers`: each imports its job when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import ConfigFile, Overrides, Workers
from pangu_sigma.cli.next_steps import end_stopped, say_next


def train(
    file: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last complete checkpoint.")] = False,
    stream: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Learn from documents as they come: a growing .jsonl file, or - (stdin)."),
    ] = None,
    domain: Annotated[str | None, typer.Option(help="With --stream: the domain of every document.")] = None,
    domain_field: Annotated[
        str | None, typer.Option(help="With --stream: key of the domain's name in a line; domain if left out.")
    ] = None,
    workers: Workers = None,
    emulate_mesh: Annotated[
        bool, typer.Option("--emulate-mesh", help="Emulate the Ascend mesh with CPU processes, one for each device.")
    ] = False,
) -> None:
    """Train the model that FILE.yaml describes.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 let it save and stop, with exit code 130 or 75; --resume continues.
    """
    from pangu_sigma.config import load_config
    from pangu_sigma.config.overrides import emulation_overrides, stream_overrides

    overrides = list(overrides or ())
    overrides += emulation_overrides(overrides) if emulate_mesh else ()
    # The whole configuration is checked before MindSpore is imported: a mistake shows at once.
    config = load_config(file, [*overrides, *stream_overrides(stream, domain, domain_field)])
    if emulate_mesh:
        workers = workers or config.parallel.mesh.size
    if workers is not None:
        from pangu_sigma.workers import with_workers

        config = with_workers(config, workers)
    from pangu_sigma.training.job import train as run_training

    result = run_training(config, resume=resume)
    from pangu_sigma.workers import is_worker

    if not is_worker():  # else the process that started them says it
        unfinished = "stopped run" if config.train.stop_at else "unfinished run"
        say_next("run" if result.finished else unfinished, result, config.domain_names)
    if not result.finished:
        end_stopped(result.stop_signal)


def mindformers(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A MindFormers configuration.")],
    overrides: Overrides = None,
) -> None:
    """Train the model of a MindFormers YAML (configs/mindformers) with MindFormers' own Trainer."""
    from pangu_sigma.integrations.mindformers.mindformers_job import train as run_trainer

    output = run_trainer(file, overrides or ())
    typer.echo(output)
    say_next("mindformers run", output)
