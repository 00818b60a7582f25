"""`pangu-sigma sft` and `pangu-sigma dpo`; each imports its job when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.next_steps import end_stopped, say_next

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Model to adapt: a run's folder, a checkpoint or a model folder.")
]
File = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Configuration, as configs/sft.yaml and dpo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Changes, e.g. train.steps=100 adapt.beta=0.2.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run's last complete checkpoint.")]


def sft(model: Model, file: File, overrides: Overrides = None, resume: Resume = False) -> None:
    """Fine-tune MODEL on prompts with answers; the loss counts the answers' tokens only.

    Model, domains and tokenizer are MODEL's; FILE.yaml names the examples of each domain and says how to train.
    """
    _adapt("sft", model, file, overrides, resume)


def dpo(model: Model, file: File, overrides: Overrides = None, resume: Resume = False) -> None:
    """Fine-tune MODEL on pairs of a chosen and a rejected answer (direct preference optimisation).

    MODEL is the beginning and, frozen, the reference; FILE.yaml names the pairs of each domain and says how to train.
    """
    _adapt("dpo", model, file, overrides, resume)


def _adapt(objective: str, model: Path, file: Path, overrides: list[str] | None, resume: bool) -> None:
    from pangu_sigma.finetuning.finetuning_job import adapt

    changes = list(overrides or ())
    result = adapt(model, file, objective, changes, resume)
    if result.finished:
        say_next("adapted run", result, list(result.losses))
        return
    from pangu_sigma.checkpoint import resolve
    from pangu_sigma.trained_model import stored_config

    stops = stored_config(resolve(result.checkpoint)).train.stop_at is not None
    again = [objective, model, file, *changes, *(["train.stop_at=null"] if stops else [])]
    say_next("unfinished fine-tuning", result, again=again)
    end_stopped(result.stop_signal)
