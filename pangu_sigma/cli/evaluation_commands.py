"""The commands `pangu-sigma evaluate`, `analyze`, `lifelong` and `report`: each imports its job when it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import Json, ModelPath, Overrides, Prior, RunFolder, Workers
from pangu_sigma.cli.next_steps import end_stopped, say_next
from pangu_sigma.errors import UserError


def evaluate(
    model: ModelPath,
    as_json: Json = False,
    batches: Annotated[
        int | None,
        typer.Option(min=0, help="Batches per text and expert group, 0 for all; evaluate.batches if left out."),
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
        typer.Option(
            help="With --tasks: text that ends a written answer; may be given several times. Default: newline."
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Measure held-out loss per domain, and every domain's text under every expert group.

    With --domain auto the domain is inferred from the text: loss with the domain inferred beside the given one, and
    how often the likeliest domain is the right one after 8, 16, 32, 64, 128 tokens.

    With --tasks the model answers questions: the likeliest of several choices, or the text that it writes.
    """
    if tasks:
        if batches is not None or top != 1 or prior is not Prior.uniform:
            raise UserError("--batches, --top and --prior do not go with --tasks: leave them out")
        if workers is not None:
            raise UserError("--tasks runs in one process: leave --workers out")
        from pangu_sigma.evaluation.task_evaluation import FewShotSettings, evaluate_tasks, tasks_table

        settings = FewShotSettings(shots, shots_from, domain, max_tokens, tuple(stop or ("\n",)))
        answered = evaluate_tasks(model, tasks, settings)
        typer.echo(json.dumps(answered, ensure_ascii=False, indent=2) if as_json else tasks_table(answered))
        return
    if shots or shots_from is not None or max_tokens != 64 or stop:
        raise UserError("--shots, --shots-from, --max-tokens and --stop say how questions are asked: add --tasks FILE")
    if domain is not None:
        from pangu_sigma.config.data_section import INFERRED_DOMAIN

        if domain != INFERRED_DOMAIN:
            raise UserError(
                f"--domain {domain} is not known here, only auto is: leave it out, every domain is measured anyway"
            )
        if workers is not None:
            raise UserError("--domain auto runs in one process: leave --workers out")
        from pangu_sigma.evaluation.inferred_domains import evaluate_inferred_domains, inferred_domains_table

        result = evaluate_inferred_domains(model, batches=batches, top=top, prior=prior.value)
        typer.echo(json.dumps(result, ensure_ascii=False, indent=2) if as_json else inferred_domains_table(result))
        return
    if top != 1 or prior is not Prior.uniform:
        raise UserError("--top and --prior say how a domain is inferred: add --domain auto")
    from pangu_sigma.evaluation.evaluation_job import evaluate as measure

    result = measure(model, batches, workers or 1)
    if result is None:
        return  # another process says it
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
        return
    from pangu_sigma.monitor.text_tables import matrix_table, measured_part, quality_table

    typer.echo(quality_table(result.unigram, result.losses))
    typer.echo("\n" + matrix_table(result.matrix))
    if (part := measured_part(result.batches)) is not None:
        typer.echo(f"\n{part} --batches 0 measures all.")
    if (model / "checkpoints").is_dir():  # a run's, of which there are pictures
        say_next("evaluation", model, list(result.losses))


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
    say_next("analysis", run / "analysis")


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
    if results.complete:
        say_next("run", plan.run_dir(plan.stages[-1]), plan.domains_after(plan.stages[-1]))
    else:
        say_next("unfinished stages", plan.dir, again=["lifelong", file, *(overrides or ())])
        end_stopped(results.stop_signal)


def report(run: RunFolder) -> None:
    """Draw a run's curves and expert load as one HTML file and print its path."""
    from pangu_sigma.report import write_report

    page = write_report(run)
    typer.echo(page)
    say_next("report", page)
