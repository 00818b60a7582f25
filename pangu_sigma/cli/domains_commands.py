"""The commands `pangu-sigma domains …`; nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pangu_sigma.cli.arguments import Json, ModelPath, NewModel, RunFolder
from pangu_sigma.cli.next_steps import say_next
from pangu_sigma.errors import UserError

if TYPE_CHECKING:
    from pangu_sigma.domains.checkpoint_editor import EditResult

domains_app = typer.Typer(
    help="Domains of a trained model: list, add, remove, rename, merge, resize, advise.\n\n"
    "A run is changed in place: its last checkpoint is replaced, in one rename, by one of the same step in which every "
    "other domain's file is the same file, and RUN/config.yaml follows; go on with `pangu-sigma train RUN/config.yaml "
    "--resume`. With --out the run stays as it is and a new one is written, which shares the unchanged files. "
    "Checkpoints of earlier steps stay as they are.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; with --out also a checkpoint or model.")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write here, to a new or empty folder, and leave RUN as it is.")
]


class ComparedDomains(StrEnum):
    """Whose experts give the outputs that --output compares."""

    own = "own"
    old = "old"


class Filters(StrEnum):
    """Which documents of a new domain are dropped."""

    none = "none"
    text = "text"
    code = "code"


FilterKind = Annotated[
    Filters, typer.Option(help="Documents to drop: text, endless repetition; code, also where a word or two are most.")
]
StarsField = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="With --filters code: key of a repository's stars in a .jsonl line."),
]


class SharedTraining(StrEnum):
    """What happens to the shared parameters while a new domain trains."""

    frozen = "frozen"
    train = "train"
    regularised = "regularised"


@domains_app.command("list", short_help="What every domain owns, has seen, and its loss.")
def list_(
    model: ModelPath,
    as_json: Json = False,
) -> None:
    """List domains: experts in each sparse layer, parameters, bytes, tokens seen in training, last loss."""
    from pangu_sigma.domains.list_domains import list_domains
    from pangu_sigma.monitor.text_tables import text_table

    facts = list_domains(model)
    if as_json:
        typer.echo(json.dumps([asdict(fact) for fact in facts], ensure_ascii=False, indent=2))
        return
    rows = []
    for fact in facts:
        kind = {"evaluate": "held-out", "train": "training"}.get(fact.loss_kind or "")
        loss = "–" if fact.loss is None else f"{fact.loss:.3f} ({kind}, step {fact.loss_step})"
        sizes = sorted(set(fact.experts.values()))
        experts = f"{len(fact.experts)} × {sizes[0]}" if len(sizes) == 1 else " ".join(map(str, fact.experts.values()))
        tokens = "–" if fact.tokens is None else f"{fact.tokens:,}"
        rows.append([fact.name, experts, f"{fact.parameters:,}", f"{fact.bytes:,}", tokens, loss])
    header = ["domain", "layers × experts", "parameters", "bytes", "tokens seen", "last loss"]
    typer.echo(text_table(header, rows))


@domains_app.command("add", short_help="Add a domain, from text or from a sibling model.")
def add(
    context: typer.Context,
    run: Run,
    name: Annotated[str | None, typer.Option(help="Name of the new domain; with --model its own if left out.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILES", help="Its text, .jsonl or .txt, globs too; repeatable.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL", help="Instead of text: a model with the same shared parameters whose domain comes in."
        ),
    ] = None,
    domain: Annotated[str | None, typer.Option(help="With --model: which of its domains.")] = None,
    experts: Annotated[int, typer.Option(min=1, help="Experts of its group in every sparse layer.")] = 4,
    init: Annotated[
        str,
        typer.Option(
            help="How they begin: from:DOMAIN (its function, routing included), mean (of all experts of the layer), "
            "nearest (from the domain that the text is likeliest to belong to), "
            "dense:MODEL (a dense model's network of the layer), random."
        ),
    ] = "mean",
    text_field: Annotated[str, typer.Option(help="Key of the text in a line of a .jsonl file.")] = "text",
    filters: FilterKind = Filters.none,
    stars_field: StarsField = None,
    weight: Annotated[float, typer.Option(min=0.0, help="How often it is drawn where a phase says nothing.")] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Plan so many steps on the new domain instead of what the run had left; learning rate anew."
        ),
    ] = None,
    shared: Annotated[
        SharedTraining,
        typer.Option(
            help="In these steps: frozen keeps every other domain to the bit; train adapts them too; regularised does "
            "so near the model as it is now (--output, --l2, --ewc)."
        ),
    ] = SharedTraining.frozen,
    output: Annotated[
        float, typer.Option(min=0.0, help="With --shared regularised: weight of KL(model before || model).")
    ] = 0.0,
    l2: Annotated[
        float, typer.Option(min=0.0, help="With --shared regularised: weight of the shared parameters' distance.")
    ] = 0.0,
    ewc: Annotated[
        float, typer.Option(min=0.0, help="The same distance, weighed by Fisher information on the other domains.")
    ] = 0.0,
    through: Annotated[
        ComparedDomains,
        typer.Option(help="With --output: compare under the new domain's experts, or under an old domain's."),
    ] = ComparedDomains.own,
    replay: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Unless frozen: share of samples from the other domains.")
    ] = 0.0,
    out: Out = None,
) -> None:
    """Add a domain: an expert group in every sparse layer with routing tables of its own.

    Without --steps the run's plan stays as it is: steps ahead draw the new domain by its --weight, unless their phase
    names its own weights. No other domain's file changes by a byte.
    """
    from pangu_sigma.config.domain_edits import plan_follow_up
    from pangu_sigma.domains.add_domain import NewDomain, add_domain, add_model

    regularise = {"output": output, "l2": l2, "ewc": ewc, "through": through.value}
    follow_up = plan_follow_up(name or "", steps, shared.value, replay, regularise)
    if model is not None:
        if data:
            raise UserError(
                "--data and --model exclude each other, as the model's domain brings its own text: leave one out"
            )
        for option in ("experts", "init", "text_field", "filters", "stars_field"):
            if context.get_parameter_source(option).name != "DEFAULT":
                raise UserError(
                    f"--{option.replace('_', '-')} says how a new domain is made, but --model brings one that is: "
                    "leave it out"
                )
        done = add_model(run, model, domain, name=name, weight=weight, follow_up=follow_up, out=out)
        name = done.checkpoint.domains[-1]
    else:
        if name is None or not data:
            raise UserError("a new domain needs --name and --data (its text), or --model (a model that has it)")
        if domain is not None:
            raise UserError("--domain chooses a domain of --model: leave it out, or name the model")
        new_domain = NewDomain(name, tuple(data), experts, init, text_field, weight, filters.value, stars_field)
        done = add_domain(run, new_domain, follow_up=follow_up, out=out)
    _, _, beginning = done.change.partition(" (") if init == "nearest" else ("", "", "")
    _print_result(done, f"{name} added ({beginning}" if beginning else f"{name} added")


@domains_app.command("expand", short_help="Grow learned gates for a new domain (Lifelong-MoE).")
def expand(
    run: RunFolder,
    name: Annotated[str, typer.Option(help="Name of the new domain.")],
    data: Annotated[list[str], typer.Option(metavar="FILES", help="Its text, .jsonl or .txt, globs too; repeatable.")],
    steps: Annotated[int, typer.Option(min=1, help="Plan so many steps on the new domain; learning rate anew.")],
    experts: Annotated[int, typer.Option(min=1, help="New experts in every sparse layer.")] = 4,
    init: Annotated[
        str, typer.Option(help="How experts begin: from:DOMAIN, mean, dense:MODEL or random, as in add.")
    ] = "mean",
    text_field: Annotated[str, typer.Option(help="Key of the text in a line of a .jsonl file.")] = "text",
    filters: FilterKind = Filters.none,
    stars_field: StarsField = None,
    weight: Annotated[float, typer.Option(min=0.0, help="How often it is drawn where a phase says nothing.")] = 1.0,
    output: Annotated[float, typer.Option(min=0.0, help="Weight of KL(model before || model), nats per token.")] = 1.0,
    l2: Annotated[float, typer.Option(min=0.0, help="Weight of the shared parameters' squared distance.")] = 0.0,
    ewc: Annotated[
        float, typer.Option(min=0.0, help="The same distance, weighed by Fisher information on the old domains.")
    ] = 0.0,
    replay: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of samples from the old domains.")] = 0.0,
) -> None:
    """Give every learned gate new experts and columns for a new domain; the old ones keep every bit while it trains.

    The other shared parameters train near the model as it was, unless --output, --l2 and --ewc are all 0. Models
    whose domains have expert groups of their own need no such thing: use add.
    """
    from pangu_sigma.config.domain_edits import FollowUpTraining
    from pangu_sigma.domains.add_domain import NewDomain
    from pangu_sigma.domains.expand_gates import expand_domain

    penalties = {"output": output, "l2": l2, "ewc": ewc} if output or l2 or ewc else None
    follow_up = FollowUpTraining(name, steps, "train" if penalties is None else "regularised", replay, penalties)
    new_domain = NewDomain(name, tuple(data), experts, init, text_field, weight, filters.value, stars_field)
    done = expand_domain(run, new_domain, follow_up)
    _print_result(done, f"{name} added")


@domains_app.command("remove", short_help="Remove a domain.")
def remove(run: Run, name: Annotated[str, typer.Option(help="Domain to remove.")], out: Out = None) -> None:
    """Remove a domain with its experts, tables and moments; all others stay as they are.

    Phases ahead that draw or train nothing else are left out of the plan.
    """
    from pangu_sigma.domains.remove_domain import remove_domain

    _print_result(remove_domain(run, name, out=out), f"{name} removed")


@domains_app.command("rename", short_help="Rename a domain.")
def rename(
    run: Run,
    name: Annotated[str, typer.Option(help="Domain to rename.")],
    to: Annotated[str, typer.Option(help="Its new name.")],
    out: Out = None,
) -> None:
    """Rename a domain: its tensors keep every byte under new names; its text goes on in a new order."""
    from pangu_sigma.domains.remove_domain import rename_domain

    _print_result(rename_domain(run, name, to, out=out), f"{name} is {to} now")


@domains_app.command("resize", short_help="Grow a domain's expert group.")
def resize(
    run: Run,
    name: Annotated[str, typer.Option(help="Domain whose group grows.")],
    experts: Annotated[int, typer.Option(min=1, help="Experts of the group in every sparse layer from now on.")],
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw the tables anew: tokens move to other experts than their own.")
    ] = False,
    out: Out = None,
) -> None:
    """Grow a group: new experts are copies (moments too) of the busiest old ones, whose tokens are split among them.

    Every token stays with its expert or goes to a copy of it, so the model is the same function until it trains.
    """
    from pangu_sigma.domains.resize_domain import resize_domain

    _print_result(resize_domain(run, name, experts, redraw=redraw, out=out), f"{name} has {experts} experts now")


@domains_app.command("advise", short_help="Propose group sizes, with the reasoning.")
def advise(
    model: ModelPath,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts of all groups together; as many as there are if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Propose the sizes of expert groups from each domain's text and measured loss; nothing is changed."""
    from pangu_sigma.domains.group_size_advice import advice_text
    from pangu_sigma.domains.group_size_advice import advise as propose

    advices = propose(model, experts)
    if as_json:
        typer.echo(json.dumps([asdict(advice) for advice in advices], ensure_ascii=False, indent=2))
    else:
        typer.echo(advice_text(advices, shlex.quote(str(model))))


@domains_app.command("merge", short_help="Join models that were trained apart.")
def merge(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL MODEL…", help="Runs, checkpoints or model folders.")],
    out: NewModel,
) -> None:
    """Write a model folder with the domains of all models, which must have equal shared parameters.

    Every domain is the same function in it, to the bit. Optimizer state stays behind; train it on with run.init_from,
    or bring a domain into a run with `pangu-sigma domains add RUN --model MODEL`.
    """
    from pangu_sigma.domains.merge_models import merge_models

    _print_result(merge_models(models, out), f"{len(models)} models merged")


def _print_result(done: EditResult, what: str) -> None:
    checkpoint, ahead = done.checkpoint, done.steps_ahead
    typer.echo(f"{what}: {checkpoint.path} (step {checkpoint.step}) has the domains {', '.join(checkpoint.domains)}")
    if done.run_dir is None:
        say_next("model", checkpoint.path, checkpoint.domains)
        return
    if done.lost_mesh:
        typer.echo("Its mesh does not hold these domains and is left out: name another to train on (parallel.*).")
    typer.echo(f"{ahead or 'No'} step{'s lie' if ahead > 1 else ' lies'} ahead.")
    # A learning rate that has come to its planned end cannot be moved by a resumed run.
    going_on = "trained run" if done.config.schedule.kind == "constant" else "annealed run"
    say_next("changed run to train" if ahead else f"changed {going_on}", done.run_dir, checkpoint.domains)
