"""What a command says at its end: where its result lies, and the commands that come next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

# What a command made -> what sentences call it, and the commands for it. {path}: where it lies; {folder}: the folder
# around it; {name}: its own name; {domain}: one of its domains; {choose}: how a command chooses that domain, nothing
# where there is no other; {again}: the command that was interrupted, as it was given.
_GENERATE = 'generate {path}{choose} --prompt "…"'
_EXTRACT = "extract {path} --domain {domain} --out models/{domain}"
_TRAIN_ON = "train {path}/config.yaml run.init_from={path} run.dir={path}-trained"
_TRAIN_IMPORTED = _TRAIN_ON + " domains.{domain}.data=FILE train.steps=100 schedule.decay_steps=null"
_NEXT = {
    "run": ("model", (_GENERATE, "evaluate {path}", _EXTRACT)),
    "unfinished run": ("run", ("train {path}/config.yaml --resume",)),
    "stopped run": ("run", ("train {path}/config.yaml train.stop_at=null --resume",)),
    "unfinished fine-tuning": ("run", ("{again} --resume",)),
    "unfinished quickstart": ("run", ("{again}",)),
    "unfinished stages": ("measurement", ("{again}",)),
    "adapted run": ("model", (_GENERATE, "evaluate {path}", "serve {path}")),
    "changed run to train": ("run", ("train {path}/config.yaml --resume", "domains list {path}")),
    "changed trained run": ("run", ("train {path}/config.yaml train.steps=… --resume", "domains list {path}")),
    "changed annealed run": ("run", (_TRAIN_ON, "domains list {path}")),
    "evaluation": ("run", (_EXTRACT, "report {path}")),
    "model": ("model", (_GENERATE, "serve {path}", _TRAIN_ON)),
    "imported model": ("model", (_GENERATE, "serve {path}", _TRAIN_IMPORTED)),
    "start": ("model", (_TRAIN_ON, _GENERATE)),
    "export": ("export", ()),
    "analysis": ("analysis", ("evaluate {folder}", "extract {folder} --list")),
    "report": ("report", ("extract {folder} --list", "serve {folder}")),
    "mindformers run": ("run", ("import mindformers {path} --out models/{name}",)),
    "quickstart corpora": ("text", ("train configs/quickstart.yaml", "quickstart")),
    "corpora": ("text", ("init runs/first {path}/code.jsonl {path}/docs.jsonl",)),
    "configuration": ("configuration", ("config {path}", "train {path}")),
}


def next_steps(
    kind: str, path: str | os.PathLike[str], domains: Sequence[str] = (), again: Sequence[str | Path] = ()
) -> str:
    """The lines for something of a `kind` (a key of `_NEXT`) at `path`, which has these domains; `again`: the words of
    the command that made it, where it is unfinished."""
    noun, commands = _NEXT[kind]
    place = shlex.quote(_shortened(Path(path)))
    domain = domains[0] if domains else "NAME"
    choose = "" if len(domains) == 1 else f" --domain {domain}"
    folder, name = shlex.quote(_shortened(Path(path).parent)), shlex.quote(Path(path).name)
    words = {"path": place, "folder": folder, "name": name, "domain": domain, "choose": choose}
    words["again"] = shlex.join(map(str, again))
    lines = [f"  pangu-sigma {command.format(**words)}" for command in commands]
    return "\n".join([f"The {noun} is in {place}." + (" Next:" if lines else ""), *lines])


def say_next(
    kind: str, path: str | os.PathLike[str], domains: Sequence[str] = (), again: Sequence[str | Path] = ()
) -> None:
    """Print `next_steps` on stderr: stdout is for results, which scripts read."""
    from pangu_sigma.monitor.progress import report

    report(next_steps(kind, path, domains, again))


def end_stopped(stop_signal: int | None) -> None:
    """End the command with the code of the signal by which its work stopped before it was done; None: none came."""
    if stop_signal is not None:
        import typer

        from pangu_sigma.signals import exit_code

        raise typer.Exit(exit_code(stop_signal))


def _shortened(path: Path) -> str:
    """The path from the current folder where it lies in it."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)
