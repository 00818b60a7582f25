"""The command line. Each command imports what it needs when it is called, so that every help text comes at once."""

from __future__ import annotations

import errno
import json
import os
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from pangu_sigma.cli.arguments import ConfigFile, Json, ModelPath, Prior, RunFolder
from pangu_sigma.cli.convert_commands import import_app, upcycle, vocab_app
from pangu_sigma.cli.doctor_command import doctor
from pangu_sigma.cli.domains_commands import domains_app
from pangu_sigma.cli.export_command import export
from pangu_sigma.cli.extract_command import extract
from pangu_sigma.cli.finetuning_commands import dpo, sft
from pangu_sigma.cli.generate_command import generate
from pangu_sigma.cli.plan_command import plan
from pangu_sigma.cli.serve_command import serve
from pangu_sigma.errors import INTERRUPTED, USER_ERROR, UserError
from pangu_sigma.version import VERSION

# What the user's disk and folders answer, where no command says it better. Other OSErrors are bugs.
_OF_THE_DISK = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip


class _Commands(TyperGroup):
    """Ends a user's mistake with one sentence and code 2, an interruption with code 130; bugs keep their traceback."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(USER_ERROR) from error
        except OSError as error:
            if error.errno not in _OF_THE_DISK:
                raise
            where = error.filename or "a file"
            typer.echo(f"Error: {where}: {error.strerror}: mend that, or name another place", err=True)
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from error


# Without rich's markup and tracebacks: they cost a third of the help's time, and a mistake is one plain sentence.
app = typer.Typer(
    cls=_Commands,
    name="pangu-sigma",
    help="One language model for many text domains: train it, measure it, cut out a domain, use it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Changes, e.g. train.steps=100 domains.code.experts=8."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes of this machine that share the work; see docs/parallel.md.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pangu-sigma {VERSION}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(short_help="Train a model.")
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
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Let CPU processes take the places of the Ascend mesh's devices.")
    ] = False,
) -> None:
    """Train the model that FILE.yaml describes."""
    from pangu_sigma.config import load_config
    from pangu_sigma.config.overrides import rehearsal_overrides, stream_overrides

    overrides = list(overrides or ())
    overrides += rehearsal_overrides(overrides) if rehearse else ()
    # The whole configuration is checked before MindSpore is imported: a mistake shows at once.
    config = load_config(file, [*overrides, *stream_overrides(stream, domain, domain_field)])
    if rehearse:
        workers = workers or config.parallel.mesh.size
    if workers is not None or config.parallel.workers > 1:
        from pangu_sigma.workers import FOLDER, is_worker, launch, with_workers

        config = with_workers(config, workers or config.parallel.workers)
        if config.parallel.workers > 1 and not is_worker():
            from pangu_sigma.train.startup.starting_point import refuse_early

            refuse_early(config, resume)
            words = ["train", str(file), *overrides, *(["--resume"] if resume else [])]
            raise typer.Exit(launch(words, config.parallel.workers, Path(config.run.dir) / FOLDER))
    from pangu_sigma.train.job import train as run_training

    run_training(config, resume=resume)


@app.command(short_help="Train with MindFormers' Trainer.")
def mindformers(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A MindFormers configuration.")],
    overrides: Overrides = None,
) -> None:
    """Train the model of a MindFormers YAML (configs/mindformers) with MindFormers' own Trainer."""
    from pangu_sigma.integrations.mindformers.mindformers_job import train as run_trainer

    typer.echo(run_trainer(file, overrides or ()))


@app.command(short_help="Print or explain a configuration.")
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

    effective = load_config(file, overrides or ())
    typer.echo(json_text(effective) if as_json else yaml_text(effective))


@app.command(short_help="Measure quality per domain.")
def evaluate(
    model: ModelPath,
    as_json: Json = False,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Batches per text and expert group; all held-out text if left out.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="auto: infer every text's domain from how likely each domain finds it so far. With --tasks also a "
            "domain's name, whose experts answer."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="With --domain auto: mix so many of the likeliest domains.")] = 1,
    prior: Annotated[
        Prior,
        typer.Option(help="With --domain auto: uniform, updating from sequence to sequence, or cached from the first."),
    ] = Prior.uniform,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Ask the questions of this .jsonl file instead; may be given several times."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="With --tasks: solved questions in front of each.")] = 0,
    shots_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --shots: their file; the task's own if left out.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="With --tasks: most tokens of a written answer.")] = 64,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="With --tasks: text that ends a written answer; may be given several times. A line's end."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Measure held-out loss per domain, and every domain's text under every expert group.

    With --domain auto nobody tells whose text it is: loss with the domain inferred beside the given one, and how often
    the likeliest domain is the right one after 32, 64, 128 tokens.

    With --tasks the model answers questions: the likeliest of several choices, or the text that it writes.
    """
    if tasks:
        if batches is not None or top != 1 or prior is not Prior.uniform:
            raise UserError("--batches, --top and --prior do not go with --tasks: leave them out")
        if workers is not None:
            raise UserError("--tasks runs in one process: leave --workers out")
        from pangu_sigma.evaluation.task_evaluation import Asking, evaluate_tasks, tasks_table

        asking = Asking(shots, shots_from, domain, max_tokens, tuple(stop or ("\n",)))
        answered = evaluate_tasks(model, tasks, asking)
        typer.echo(json.dumps(answered, ensure_ascii=False, indent=2) if as_json else tasks_table(answered))
        return
    if shots or shots_from is not None or max_tokens != 64 or stop:
        raise UserError("--shots, --shots-from, --max-tokens and --stop say how questions are asked: add --tasks FILE")
    if domain is not None:
        from pangu_sigma.config.rules import INFERRED_DOMAIN

        if domain != INFERRED_DOMAIN:
            raise UserError(
                f"--domain {domain} is not known here, only auto is: leave it out, every domain is measured anyway"
            )
        if workers is not None:
            raise UserError("--domain auto runs in one process: leave --workers out")
        from pangu_sigma.evaluation.inferred_domains import evaluate_unknown, unknown_table

        found = evaluate_unknown(model, batches=batches, top=top, prior=prior.value)
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2) if as_json else unknown_table(found))
        return
    if top != 1 or prior is not Prior.uniform:
        raise UserError("--top and --prior say how a domain is inferred: add --domain auto")
    if workers is not None and workers > 1:
        from pangu_sigma.workers import is_worker, launch_on_model

        if not is_worker():
            limit = ["--batches", str(batches)] if batches else []
            words = ["evaluate", str(model), *(["--json"] if as_json else []), *limit]
            raise typer.Exit(launch_on_model(words, workers, model))
    from pangu_sigma.evaluation.domain_evaluation import evaluate as measure

    result = measure(model, batches, workers or 1)
    if result is None:
        return  # another process says it
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, indent=2))
        return
    from pangu_sigma.monitor.text_tables import matrix_table, quality_table

    typer.echo(quality_table(result["unigram"], result["losses"]))
    typer.echo("\n" + matrix_table(result["matrix"]))


@app.command(short_help="Measure how a run's model routes.")
def analyze(
    run: RunFolder,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out tokens of each domain to look at.")] = 4096,
    as_json: Json = False,
) -> None:
    """Measure the routing of a run's checkpoints on held-out text: saturation, load, specialisation, co-activation.

    Writes analysis.json and a folder analysis/ of CSV tables into the run's folder, and the report with figures.
    """
    from pangu_sigma.evaluation.routing_analysis import analyze as measure
    from pangu_sigma.evaluation.routing_analysis_files import summary
    from pangu_sigma.report.report_page import write_report

    result = measure(run, tokens)
    page = write_report(run)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, indent=2))
        return
    typer.echo(summary(result))
    for sentence in result["passed_over"]:
        typer.echo(f"not compared: {sentence}")
    typer.echo(f"\nTables: {run / 'analysis'}, figures: {page}")


app.command(short_help="Fine-tune a model on prompts with answers.")(sft)
app.command(short_help="Fine-tune a model on preferences between answers.")(dpo)
app.command(short_help="Continue a text.")(generate)
app.command(short_help="Tell what a configuration needs of a cluster.")(plan)
app.command(short_help="Try out what a training would use here.")(doctor)
app.command(short_help="Cut domains out of a model.")(extract)
app.command(short_help="Write a model for another program.")(export)
app.add_typer(import_app, name="import", short_help="Take over another model's weights.")
app.command(short_help="Start a sparse model from a dense one.")(upcycle)
app.add_typer(domains_app, name="domains", short_help="Add, remove, rename, merge a model's domains.")
app.add_typer(vocab_app, name="vocab", short_help="Change a model's vocabulary.")
app.command(short_help="Serve a model over HTTP.")(serve)


@app.command(short_help="Learn domains one after another, and measure what is kept.")
def lifelong(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Stages over a configuration.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Learn domains stage by stage; after each, measure all of them. The same command resumes and goes on.

    Prints the matrix of losses, backward transfer, forgetting, forward transfer, costs and the property table; writes
    JSON, CSV, a heat map and one HTML page to the run.dir of the configuration.
    """
    from pangu_sigma.lifelong.stage_plan import load_plan

    # The whole sequence is checked before MindSpore is imported: a mistake shows at once.
    plan = load_plan(file, overrides or ())
    from pangu_sigma.lifelong.lifelong_job import run_lifelong
    from pangu_sigma.lifelong.lifelong_results import as_text

    results = run_lifelong(plan, say=lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(json.dumps(results.to_dict(), ensure_ascii=False, indent=2))
    else:
        typer.echo(as_text(results, plan.dir))


@app.command(short_help="Draw a run as one HTML file.")
def report(run: RunFolder) -> None:
    """Draw a run's curves and expert load as one HTML file and print its path."""
    from pangu_sigma.report import write_report

    typer.echo(write_report(run))


@app.command(short_help="Build the quickstart's domains.")
def corpora(out: Annotated[Path, typer.Option(help="Folder to write to, one .jsonl file per domain.")]) -> None:
    """Build the quickstart's four domains from what this machine has; nothing is downloaded."""
    from pangu_sigma.data.builtin_corpora import build

    for path in build(out).values():
        typer.echo(path)


@app.command(short_help="Train a small model and show the result.")
def quickstart(
    file: ConfigFile = Path("configs/quickstart.yaml"),
    overrides: Overrides = None,
) -> None:
    """Train on the quickstart's domains and show what came of it: table, samples, report, a domain cut out."""
    from pangu_sigma.config import load_config

    config = load_config(file, overrides or ())
    from pangu_sigma.quickstart import quickstart as run_quickstart

    finished = run_quickstart(config)
    if finished is not None:
        from extract.quickstart_extraction import cut_out_and_show

        cut_out_and_show(finished, config.run.device)


def main() -> None:
    """Entry point of the console script and of `python -m pangu_sigma`."""
    # Before anything imports MindSpore, whose C++ side otherwise logs over the terminal.
    os.environ.setdefault("GLOG_v", "4")
    role = os.environ.get("MS_ROLE")
    if role == "MS_SCHED":
        from parallel.comm.launch import schedule

        schedule()
    elif role == "MS_WORKER":
        _work()
    else:
        app(prog_name="pangu-sigma")


def _work() -> None:
    """Be one of several processes: however it ends, the process ends too, whatever the others do."""
    from pangu_sigma.workers import leave

    code = 0
    try:
        app(prog_name="pangu-sigma")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)
