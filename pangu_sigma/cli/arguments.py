"""Arguments and options that several commands share, each with one help text."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Configuration of the run.")]
ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run's folder, one of its checkpoints or a model folder.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Changes, e.g. train.steps=100 domains.code.experts=8."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes of this machine that share the work; see docs/parallel.md.")
]
NewModel = Annotated[Path, typer.Option(metavar="DIR", help="Model folder to write: new or empty.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
PriorTexts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="With --prior cached: texts like the prompts, .jsonl or .txt.")
]


class Prior(StrEnum):
    """Prior probabilities of the domains where the domain of a text is inferred."""

    uniform = "uniform"
    updating = "updating"
    cached = "cached"
