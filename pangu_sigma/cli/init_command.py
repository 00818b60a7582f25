"""The command `pangu-sigma init`; nothing heavy is imported before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.next_steps import say_next


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the configuration and of its run.")],
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA…", help="One domain each: a .txt or .jsonl file, or a folder of them.")
    ],
) -> None:
    """Write a configuration that trains on your own text, and say what it assumes."""
    from pangu_sigma.monitor.text_tables import text_table
    from pangu_sigma.new_configuration import write_configuration

    made = write_configuration(folder, data)
    config = made.config
    rows = [
        [domain.name, f"{made.documents[domain.name]:,}", f"{sum(made.dropped[domain.name].values()):,}"]
        + [f"{made.tokens[domain.name]:,}", f"{made.passes[domain.name]:.1f}", f"{domain.experts}"]
        + [domain.text_field if any(path.lower().endswith(".jsonl") for path in domain.data) else "–"]
        for domain in config.domains
    ]
    header = ["domain", "documents", "dropped", "tokens", "passes over them", "experts", "key of the text"]
    typer.echo("\n".join([text_table(header, rows), *made.messages]))
    vocabulary = config.data.tokenizer.vocab_size
    typer.echo(
        f"\nassumes a {config.model.preset} model, a tokenizer of {vocabulary:,} pieces trained on this text, and "
        f"sequences of {config.data.sequence_length} tokens; model.preset and train.steps in the file change that"
    )
    for line in made.summary:
        typer.echo(line)
    say_next("configuration", made.path)
