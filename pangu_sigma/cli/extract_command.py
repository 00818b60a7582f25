"""The command `pangu-sigma extract`, also `python -m extract`; nothing heavy is imported before it is called."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pangu_sigma.cli.arguments import Json, ModelPath
from pangu_sigma.cli.next_steps import say_next
from pangu_sigma.errors import UserError

if TYPE_CHECKING:
    from extract.extraction_plan import ExtractionPlan

def extract(
    model: ModelPath,
    domain: Annotated[
        list[str] | None, typer.Option("--domain", metavar="NAME", help="Domain to keep; may be given several times.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write the sub-model to: new or empty.")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List the model's domains and what each owns; no more.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Type of the stored weights: float32, float16, bfloat16; left out: as they are."
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest file, e.g. 500MB or 4GiB; left out: the parent's files.")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Turn groups of one expert into dense layers: an ordinary PanGu-α.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare logits with the parent's before the folder is named.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Cut domains out of a model: shared layers and their experts, a complete model of its own.

    Without --domain it lists the model's domains: experts in each sparse layer, parameters, bytes and files.
    """
    if listing or not domain:
        if out is not None or dry_run:
            raise UserError("no domain to keep is given: choose with --domain, or leave out --out and --dry-run")
        _list(model, as_json)
        return
    if out is None and not dry_run:
        raise UserError("--out is missing: name a folder for the sub-model, or use --dry-run")
    from extract.extraction_job import extract as run
    from extract.extraction_job import plan
    from pangu_sigma.checkpoint.file_size import parse_size

    shard = parse_size(max_shard_size) if max_shard_size is not None else None
    cut = plan(model, domain, out, dtype=dtype, max_shard_bytes=shard, fold=fold)
    if dry_run:
        _print_plan(cut, out, as_json)
        return
    extracted = run(cut, out, check=check)
    if as_json:
        typer.echo(json.dumps(extracted.to_dict(), ensure_ascii=False, indent=2))
    else:
        from extract.extraction_summary import summary_text

        typer.echo(summary_text(extracted, out))
        say_next("model", out, cut.domains)


def _list(model: Path, as_json: bool) -> None:
    from pangu_sigma.domains.list_domains import list_files
    from pangu_sigma.monitor.text_tables import text_table

    listings = list_files(model)
    if as_json:
        typer.echo(json.dumps([asdict(listing) for listing in listings], ensure_ascii=False, indent=2))
        return
    rows = [
        [d.name, " ".join(str(n) for n in d.experts.values()), f"{d.parameters:,}", f"{d.bytes:,}", " ".join(d.files)]
        for d in listings
    ]
    typer.echo(text_table(["domain", "experts", "parameters", "bytes", "files"], rows))


def _print_plan(cut: ExtractionPlan, out: Path | None, as_json: bool) -> None:
    from pangu_sigma.config import parameter_counts
    from pangu_sigma.monitor.text_tables import text_table

    # Of the place depend a few bytes: how its configuration names the text.
    folder = cut.folder(out if out is not None else cut.parent.path)
    counts = parameter_counts(cut.config, cut.config.model.vocab_size)
    files = [(file.path, file.size, "copied" if file.copy else "written") for file in folder.files]
    if as_json:
        plan = {
            "parent": str(cut.parent.path),
            "domains": list(cut.domains),
            "parameters": counts.to_dict(),
            "bytes": folder.bytes,
            "files": [{"path": path, "bytes": size, "how": how} for path, size, how in files],
        }
        typer.echo(json.dumps(plan, ensure_ascii=False, indent=2))
        return
    typer.echo(text_table(["file", "how", "bytes"], [[p, how, f"{size:,}"] for p, size, how in files], left=2))
    typer.echo(
        f"\n{', '.join(cut.domains)} of {cut.parent.path}: {counts.total:,} parameters, {folder.bytes:,} bytes in "
        f"{len(files)} files and a few small ones; nothing was written"
    )
