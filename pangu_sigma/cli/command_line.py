"""The application `pangu-sigma`: its commands, and how one ends. Nothing heavy is imported before."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.core import TyperGroup

from pangu_sigma.cli.config_command import config
from pangu_sigma.cli.convert_commands import import_app, upcycle, vocab_app
from pangu_sigma.cli.doctor_command import doctor
from pangu_sigma.cli.domains_commands import domains_app
from pangu_sigma.cli.evaluation_commands import analyze, evaluate, lifelong, report
from pangu_sigma.cli.export_command import export
from pangu_sigma.cli.extract_command import extract
from pangu_sigma.cli.finetuning_commands import dpo, sft
from pangu_sigma.cli.generate_command import generate
from pangu_sigma.cli.init_command import init
from pangu_sigma.cli.plan_command import plan
from pangu_sigma.cli.quickstart_commands import corpora, quickstart
from pangu_sigma.cli.serve_command import serve
from pangu_sigma.cli.standard_streams import install_standard_streams, output_failure
from pangu_sigma.cli.train_commands import mindformers, train
from pangu_sigma.errors import INTERRUPTED, STOPPED, USER_ERROR, UserError, arguments_as_flags, disk_errors_explained
from pangu_sigma.signals import (
    SignalThread,
    interruption_message,
    stop_signals_raise,
    take_signals_in_a_thread,
)
from pangu_sigma.version import VERSION

# Commands whose result lies on disk or is served: they go on, and end well, whatever becomes of standard output.
_WITHOUT_OUTPUT = {"train", "mindformers", "sft", "dpo", "lifelong", "quickstart", "serve"}
# What several processes of msrun do together; every other command would do its work once in each of them.
_OF_SEVERAL_PROCESSES = {"train", "mindformers", "evaluate"}
_HELP = (
    "One language model for many text domains: train it, measure it, cut out a domain, use it.\n\n"
    "Exit codes: 0 done; 2 a mistake that the message explains; 75 stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, "
    "130 by Ctrl-C, before it was done (a training has saved; --resume continues)."
)


class _Commands(TyperGroup):
    """Ends a user's mistake with one sentence and code 2, an interruption with 130 or 75; bugs keep their traceback."""

    def invoke(self, ctx: typer.Context) -> object:
        gc.enable()
        try:
            with disk_errors_explained(), stop_signals_raise(), arguments_as_flags():
                return super().invoke(ctx)
        except UserError as error:
            _say(f"Error: {' '.join(str(error).split())}")
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            _say(interruption_message(error))
            raise typer.Exit(getattr(error, "exit_code", INTERRUPTED)) from error


def _say(sentence: str) -> None:
    """Say by what the command ends; of several processes of one command, whoever started them says it."""
    if os.environ.get("MS_ROLE") == "MS_WORKER":
        from pangu_sigma.workers import leave_to_launcher

        if leave_to_launcher(sentence):
            return
    typer.echo(sentence, err=True)


def _new_application() -> typer.Typer:
    # Without rich's markup and tracebacks: they cost a third of the help's time, and a mistake is one plain sentence.
    return typer.Typer(
        cls=_Commands,
        name="pangu-sigma",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


app = _new_application()


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"pangu-sigma {VERSION}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(short_help="Write a configuration for your own text.")(init)
app.command(short_help="Train a model.")(train)
app.command(short_help="Train with MindFormers' Trainer.")(mindformers)
app.command(short_help="Print or explain a configuration.")(config)
app.command(short_help="Measure quality per domain.")(evaluate)
app.command(short_help="Measure how a run's model routes.")(analyze)
app.command(short_help="Fine-tune a model on prompts with answers.")(sft)
app.command(short_help="Fine-tune a model on preferences between answers.")(dpo)
app.command(short_help="Continue a text.")(generate)
app.command(short_help="Estimate what a configuration needs on a cluster.")(plan)
app.command(short_help="Check what training needs of this machine.")(doctor)
app.command(short_help="Cut domains out of a model.")(extract)
app.command(short_help="Write a model for another program.")(export)
app.add_typer(import_app, name="import", short_help="Import another model's weights.")
app.command(short_help="Start a sparse model from a dense one.")(upcycle)
app.add_typer(domains_app, name="domains", short_help="Add, remove, rename, resize, merge a model's domains.")
app.add_typer(vocab_app, name="vocab", short_help="Change a model's vocabulary.")
app.command(short_help="Serve a model over HTTP.")(serve)
app.command(short_help="Learn domains one after another, and measure what is kept.")(lifelong)
app.command(short_help="Draw a run as one HTML file.")(report)
app.command(short_help="Build the quickstart's domains.")(corpora)
app.command(short_help="Train a small model and show the result.")(quickstart)


def application_for(words: Sequence[str]) -> typer.Typer:
    """The application as the command line `words` needs it: every other command has its name and short help alone.

    Making the options of all commands takes longer than anything else that a help text waits for.
    """
    named = _command_named(words)
    narrowed = _new_application()
    narrowed.registered_callback = app.registered_callback
    for command in app.registered_commands:
        if command.callback.__name__ == named:
            narrowed.registered_commands.append(command)
        else:
            narrowed.command(command.callback.__name__, short_help=command.short_help)(_without_options)
    for group in app.registered_groups:
        if group.name == named:
            narrowed.registered_groups.append(group)
        else:
            narrowed.command(group.name, short_help=group.short_help)(_without_options)
    return narrowed


def _command_named(words: Sequence[str]) -> str | None:
    return next((word for word in words if not word.startswith("-")), None)


def _without_options() -> None:
    """Stands for a command that is not called."""


def main(words: Sequence[str] | None = None, name: str = "pangu-sigma") -> None:
    """Entry point of the console script and of `python -m …`. words: those of the command line if left out; name: what
    usage calls the program."""
    words = sys.argv[1:] if words is None else words
    # Before anything imports MindSpore, whose C++ side otherwise logs over the terminal.
    os.environ.setdefault("GLOG_v", "4")
    role = os.environ.get("MS_ROLE")
    if role == "MS_SCHED":
        from parallel.comm.scheduler import schedule_for_msrun

        sys.exit(schedule_for_msrun())
    install_standard_streams()
    signals = take_signals_in_a_thread()
    if role == "MS_WORKER":
        _run_worker(words, name, signals)
    else:
        _run(words, name, signals)


def _run(words: Sequence[str], name: str, signals: SignalThread) -> None:
    # Looking for garbage, where there is none, takes a fifth of a help text's time; `_Commands` begins it again.
    gc.disable()
    try:
        application_for(words)(words, prog_name=name)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        failure = None if code or _command_named(words) in _WITHOUT_OUTPUT else output_failure()
        if failure is not None:
            _say(f"Error: standard output could not be written ({failure.strerror}): name another place for it")
            code = USER_ERROR
        signals.final_code = code
        if code in (STOPPED, INTERRUPTED):
            # MindSpore's own way out aborts where it was interrupted.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


def _run_worker(words: Sequence[str], name: str, signals: SignalThread) -> None:
    """Run a command as one of several processes: however it ends, the process ends too, whatever the others do."""
    from pangu_sigma.workers import check_started_as_several, leave

    code = 0
    try:
        check_started_as_several(_command_named(words), _OF_SEVERAL_PROCESSES)
        _run(words, name, signals)
    except UserError as error:
        _say(f"Error: {error}")
        code = USER_ERROR
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)
