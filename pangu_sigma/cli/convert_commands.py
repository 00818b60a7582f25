"""The commands `pangu-sigma import …`, `upcycle` and `vocab …`; nothing heavy is imported before one runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import ModelPath, NewModel
from pangu_sigma.cli.next_steps import say_next

OneDomain = Annotated[str, typer.Option(help="Name of the model's one domain.")]
ItsTexts = Annotated[
    list[str] | None, typer.Option(metavar="FILES", help="Texts of that domain, for pangu-sigma evaluate.")
]

import_app = typer.Typer(help="Take over another model's weights.", no_args_is_help=True, rich_markup_mode=None)
vocab_app = typer.Typer(help="Change a model's vocabulary.", no_args_is_help=True, rich_markup_mode=None)


class TokenizerKind(StrEnum):
    """Tokenizers that a model file makes."""

    pangu_alpha = "pangu_alpha"
    sentencepiece = "sentencepiece"
    huggingface = "huggingface"


class Activation(StrEnum):
    """Activations of the feed-forward network."""

    gelu = "gelu"
    fast_gelu = "fast_gelu"


class PieceType(StrEnum):
    """How a new piece is found in text."""

    user_defined = "user-defined"
    normal = "normal"


class InitialRows(StrEnum):
    """How new embedding rows begin."""

    normal = "normal"
    mean = "mean"


@import_app.callback()
def _import() -> None:
    pass


@vocab_app.callback()
def _vocab() -> None:
    pass


@import_app.command("pangu-alpha", short_help="Import a PanGu-α checkpoint of MindSpore.")
def import_pangu_alpha(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Merged .ckpt file, or the folder with the shards, strategy file and .npy files."
        ),
    ],
    out: NewModel,
    tokenizer: Annotated[Path, typer.Option(metavar="FILE", help="PanGu-α's vocab.model.")],
    tokenizer_kind: Annotated[
        TokenizerKind, typer.Option(help="pangu_alpha splits words with jieba first.")
    ] = TokenizerKind.pangu_alpha,
    eod_id: Annotated[
        int | None, typer.Option(min=0, help="End-of-document id; the tokenizer's own if left out (PanGu-α: 9, <eot>).")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads; known for the published sizes, else needed.")
    ] = None,
    activation: Annotated[
        Activation, typer.Option(help="What the model was trained with: gelu in the original code, fast_gelu later.")
    ] = Activation.gelu,
    strategy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Strategy file of the shards; the folder's own if left out.")
    ] = None,
    domain: OneDomain = "general",
    data: ItsTexts = None,
) -> None:
    """Write a model folder with the dense model of a PanGu-α checkpoint.

    Every tensor of the source is used, or listed as left behind by a rule; otherwise nothing is written.
    """
    from pangu_sigma.convert import import_pangu_alpha

    settings = import_pangu_alpha.PanguAlphaImportSettings(
        tokenizer=tokenizer, tokenizer_kind=tokenizer_kind.value, eod_id=eod_id, domain=domain, data=tuple(data or ()),
        heads=heads, activation=activation.value, strategy=strategy,
    )  # fmt: skip
    done = import_pangu_alpha.import_pangu_alpha(source, out, settings)
    model = done.config.model
    typer.echo(
        f"{done.checkpoint.path}: {done.num_parameters:,} parameters, {model.layers} layers (query layer included), "
        f"hidden {model.hidden}, heads {model.heads}, ffn {model.ffn}, vocabulary {model.vocab_size}, positions "
        f"{model.positions}, {model.activation}, end-of-document id {done.eod_id}"
    )
    typer.echo(f"every parameter was assigned once ({done.transposed} transposed), every tensor of the source used")
    for line in import_pangu_alpha.skipped_lines(done.skipped):
        typer.echo(line)
    say_next("model" if data else "imported model", out, done.config.domain_names)


@import_app.command("mindformers", short_help="Import a checkpoint of a MindFormers training.")
def import_mindformers(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Output folder of a MindFormers run (its latest step), or a file in it."),
    ],
    out: NewModel,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's output_dir, where the file lies elsewhere.")
    ] = None,
) -> None:
    """Write a model folder with the model that pangu-sigma mindformers trained.

    Every tensor of the source is used, or listed as left behind by a rule; otherwise nothing is written.
    """
    from pangu_sigma.integrations.mindformers import import_mindformers

    done = import_mindformers.import_mindformers(source, out, run)
    typer.echo(f"{done.checkpoint.path}: {done.num_parameters:,} parameters of {done.file.name}, each assigned once")
    for line in import_mindformers.SKIPPED.lines(done.skipped):
        typer.echo(line)
    say_next("model", out, done.checkpoint.domains)


@import_app.command("hf", short_help="Import an OLMoE in Hugging Face's format.")
def import_hf(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an OlmoeForCausalLM, of safetensors files.")],
    out: NewModel,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokenizer's file; DIR/tokenizer.json if left out.")
    ] = None,
    tokenizer_kind: Annotated[
        TokenizerKind, typer.Option(help="What that file is: a tokenizer.json, or a SentencePiece model.")
    ] = TokenizerKind.huggingface,
    eod_id: Annotated[
        int | None, typer.Option(min=0, help="End-of-document id; config.json's eos_token_id if left out.")
    ] = None,
    domain: OneDomain = "general",
    data: ItsTexts = None,
) -> None:
    """Write a model folder with the weights of an OlmoeForCausalLM, bit for bit.

    Every tensor of the source is used and every tensor of the model assigned once; otherwise nothing is written.
    """
    from pangu_sigma.convert.import_olmoe import OlmoeImportSettings, import_olmoe

    settings = OlmoeImportSettings(
        tokenizer=tokenizer, tokenizer_kind=tokenizer_kind.value, eod_id=eod_id, domain=domain, data=tuple(data or ())
    )
    done = import_olmoe(source, out, settings)
    model = done.config.model
    typer.echo(
        f"{done.checkpoint.path}: {done.num_parameters:,} parameters, {model.layers} layers, hidden {model.hidden}, "
        f"heads {model.heads}, {done.config.domains[0].experts} experts of {model.ffn} in each, "
        f"{done.config.experts_per_token} for a token, vocabulary {model.vocab_size}, end-of-document id {done.eod_id}"
    )
    typer.echo(f"all {done.tensors} tensors of the source were used, every parameter was assigned once")
    say_next("model" if data else "imported model", out, done.config.domain_names)


def upcycle(
    dense: Annotated[
        Path, typer.Argument(metavar="DENSE", help="A dense model: a run's folder, a checkpoint or a model folder.")
    ],
    config: Annotated[Path, typer.Option(metavar="SPARSE.yaml", help="Configuration of the sparse model.")],
    out: NewModel,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Changes of the configuration.")
    ] = None,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Noise on every expert's weights, as a share of their standard deviation.")
    ] = 0.0,
) -> None:
    """Make a dense model the start of a sparse one: without noise, both give the same logits.

    Every expert starts as its layer's feed-forward network; routing tables are drawn as for a new model.
    """
    from pangu_sigma.convert.upcycle import upcycle as convert

    done = convert(dense, config, out, overrides or (), noise)
    layers = len(done.config.model.sparse_prefixes)
    experts = sum(domain.experts for domain in done.config.domains)
    typer.echo(
        f"{done.checkpoint.path}: {done.dense_parameters:,} parameters became {done.num_parameters:,}, in {layers} "
        f"sparse layers of {experts} experts for {len(done.config.domains)} domains; vocabulary and tokenizer are the "
        "dense model's"
    )
    if not done.same_function:
        typer.echo(
            f"the router {done.config.model.sparse.router} scales what experts give, so the model begins as another "
            "function than the dense one: train it before use"
        )
    say_next("start", out)


@vocab_app.command("extend", short_help="Add pieces to the tokenizer, rows to the embeddings.")
def extend(
    model: ModelPath,
    out: NewModel,
    pieces: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New pieces, one a line, in the order of their ids.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE.model", help="Instead: a SentencePiece model that begins with the model's pieces."),
    ] = None,
    piece_type: Annotated[
        PieceType,
        typer.Option(help="user-defined: a piece is taken wherever the text has it; normal: after all old pieces."),
    ] = PieceType.user_defined,
    initial: Annotated[
        InitialRows, typer.Option(help="New rows: normal draws them as for a new model, mean is the old rows' mean.")
    ] = InitialRows.normal,
    skip_known: Annotated[bool, typer.Option("--skip-known", help="Pass over pieces that are there already.")] = False,
) -> None:
    """Write a model folder with a larger vocabulary: old ids, rows and routing entries stay as they are."""
    from pangu_sigma.convert.extend_vocabulary import extend_vocabulary

    done = extend_vocabulary(model, out, pieces, tokenizer, piece_type.value, initial.value, skip_known)
    spare = min(done.pieces, done.old_rows) - done.old_pieces
    how = "Normal(0, model.init_std)" if initial is InitialRows.normal else "the mean of the old rows"
    typer.echo(
        f"{done.checkpoint.path}: {done.old_pieces} pieces became {done.pieces}, {done.old_rows} embedding rows "
        f"{done.rows}; new rows are {how}"
    )
    if done.skipped:
        typer.echo(f"{len(done.skipped)} given pieces were there already and keep their ids")
    if spare > 0:
        typer.echo(f"{spare} new ids took rows that the embeddings had without a piece; they keep their bytes")
    say_next("start", out)
