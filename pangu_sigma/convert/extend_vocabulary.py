"""Extending a model's vocabulary: more pieces in the tokenizer, more rows in the embeddings, longer routing tables.

Old ids keep their pieces, old rows their bytes, old entries of routing tables their experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np

from pangu_sigma.checkpoint import Checkpoint, TensorSpec, resolve
from pangu_sigma.checkpoint.float_types import as_float32, convert_float
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.checkpoint.tensor_file import raw_bytes
from pangu_sigma.config import Config, config_from_dict, effective
from pangu_sigma.config.parameter_counts import tensor_shapes
from pangu_sigma.convert.conversion_coverage import check_coverage
from pangu_sigma.convert.converted_folder import ConvertedModel, tokenizer_contents, write_converted
from pangu_sigma.convert.tokenizer_pieces import NORMAL, USER_DEFINED, known_pieces, read_pieces, replaced, with_pieces
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError, argument
from pangu_sigma.tensor_names import OUTPUT_WORDS, WORDS, is_routing, parse_name
from pangu_sigma.trained_model import stored_config, stored_tokenizer
from rre.counted_random import generator, normal
from rre.router_specs import LAYER
from rre.routing_tables import extend_table

PIECE_TYPES = {"user-defined": USER_DEFINED, "normal": NORMAL}
Initial = Literal["normal", "mean"]
_ROWS = 4096  # new rows that are made at a time


@dataclass(frozen=True, repr=False)
class ExtendedModel(ConvertedModel):
    """The written folder; rows and pieces before and after; given pieces that were there already."""

    old_pieces: int
    pieces: int
    old_rows: int
    rows: int
    skipped: tuple[str, ...] = ()


def extend_vocabulary(
    model: Path,
    out: Path,
    pieces: Path | None = None,
    tokenizer: Path | None = None,
    piece_type: str = "user-defined",
    initial: Initial = "normal",
    skip_known: bool = False,
) -> ExtendedModel:
    """Write `out`, the model folder of `model` with a larger vocabulary.

    pieces: a text file of new pieces, one a line (`skip_known`: those that are there already are passed over); or
    tokenizer: a SentencePiece model that begins with the model's own pieces. initial: new embedding rows are
    Normal(0, model.init_std), drawn for (seed, tensor, first new row), or all the mean of the old rows. Routing tables
    are extended by the rule of model.sparse.table; `frequency` counts the domains' texts again, in the new tokenizer's
    tokens. Optimizer state is not taken along.

    Where the embeddings have more rows than the tokenizer has pieces, new pieces take those rows first, and they keep
    their bytes. Raises UserError; nothing is written then.
    """
    out = check_output(out)
    if (pieces is None) == (tokenizer is None):
        raise UserError(
            f"new pieces come from a text file ({argument('pieces')}) or a SentencePiece model "
            f"({argument('tokenizer')}): give one of the two"
        )
    for name, value, known in (("piece_type", piece_type, PIECE_TYPES), ("initial", initial, get_args(Initial))):
        if value not in known:
            raise UserError(f"{argument(name, value)} is unknown: choose one of {', '.join(known)}")
    source = resolve(model)
    old_config = stored_config(source)
    old = stored_tokenizer(source)
    new, skipped = _tokenizer(old, pieces, tokenizer, PIECE_TYPES[piece_type], skip_known)
    old_rows = old_config.model.vocab_size
    rows = max(old_rows, new.vocab_size)
    config = _extended_config(old_config, out, new, rows)
    has_tables = config.model.sparse_prefixes and config.model.router_spec.tables
    needs_counts = has_tables and config.model.sparse.table == "frequency" and rows > old_rows
    counts = _counts(config, new, rows) if needs_counts else {}
    targets, names = tensor_shapes(config, rows), source.names(optimizer=False)
    entries = {name: source.manifest.tensors[name] for name in names}
    kept = [(name, name, (rows, *entry.shape[1:]) if _grows(name) else entry.shape) for name, entry in entries.items()]
    check_coverage(f"the model {source.path}", targets, kept, names)
    experts = config.expert_groups
    experts[LAYER] = sum(experts.values())

    def read(spec: TensorSpec) -> np.ndarray | Iterator[memoryview]:
        if not _grows(spec.name) or rows == old_rows:
            return source.byte_chunks(spec.name)
        tensor = source.load([spec.name])[spec.name]
        if not is_routing(spec.name):
            return _with_rows(tensor, spec, config, initial)
        layer_name, owner = parse_name(spec.name).layer, parse_name(spec.name).owner
        return extend_table(
            config.model.sparse.table, config.run.seed, layer_name, owner, tensor, rows, experts[owner],
            counts.get(owner),
        )  # fmt: skip

    written = write_converted(
        out,
        config,
        "extend",
        origin={
            "job": "vocab extend",
            "source": source.path.name,
            "sha256": source.sha256,
            "old_rows": old_rows,
            "initial": initial,
        },
        card=_card(source, old, new, old_rows, rows, initial),
        tensors=[TensorSpec(name, entries[name].dtype, shape) for name, shape in targets.items()],
        read=read,
        coverage=source.coverage,
        **tokenizer_contents(new, source.fingerprints.corpora),
        step=source.step,
        probe=source.probe(),
    )
    return ExtendedModel(written, config, old.vocab_size, new.vocab_size, old_rows, rows, skipped)


def _tokenizer(
    old: Tokenizer, pieces: Path | None, tokenizer: Path | None, kind: int, skip_known: bool
) -> tuple[Tokenizer, tuple[str, ...]]:
    """The extended tokenizer, and the given pieces that `old` has already."""
    if tokenizer is not None:
        return replaced(old, tokenizer), ()
    given = read_pieces(pieces)
    skipped = known_pieces(old, given) if skip_known else []
    there = set(skipped)
    fresh = [piece for piece in given if piece not in there]
    if not fresh:
        raise UserError(f"the tokenizer has every piece of {pieces} already: name new ones")
    return with_pieces(old, fresh, kind), tuple(skipped)


def _extended_config(old: Config, out: Path, tokenizer: Tokenizer, rows: int) -> Config:
    values = old.to_dict()
    values["model"]["vocab_size"] = rows
    values["run"]["dir"] = str(out)
    # The tokenizer is not what training on the domains' mix would give any more: it is the one in the folder.
    values["data"]["tokenizer"] = {"kind": tokenizer.kind, "path": str(out / "tokenizer" / "tokenizer.model")}
    return effective(config_from_dict(values, source="the extended model"))


def _counts(config: Config, tokenizer: Tokenizer, rows: int) -> Mapping[str, np.ndarray]:
    """Occurrences [rows] of every id in each domain's text, and in all of it (LAYER).

    UserError where a text is not there any more.
    """
    from pangu_sigma.data.corpus import prepare_corpus

    with TemporaryDirectory() as cache:
        values = config.to_dict()
        values["data"]["cache"] = cache
        corpus = prepare_corpus(config_from_dict(values), tokenizer)
        counts = corpus.token_counts(rows)
    return counts | {LAYER: sum(counts.values())}


def _grows(name: str) -> bool:
    """Whether a tensor has one entry or row for every vocabulary id."""
    return is_routing(name) or parse_name(name).part in (WORDS, OUTPUT_WORDS)


def _with_rows(tensor: np.ndarray, spec: TensorSpec, config: Config, initial: Initial) -> Iterator[memoryview]:
    """The bytes of an embedding [rows, D]: the old rows as they are, then the new ones in the same type."""
    yield raw_bytes(tensor)
    old, (rows, hidden) = len(tensor), spec.shape
    if initial == "mean":
        mean = as_float32(spec.name, tensor).mean(0, dtype=np.float64).astype(np.float32)
    rng = generator(config.run.seed, f"new rows {spec.name}", old)
    for begin in range(old, rows, _ROWS):
        count = min(_ROWS, rows - begin)
        if initial == "mean":
            fresh = np.broadcast_to(mean, (count, hidden))
        else:
            fresh = normal(rng, (count, hidden), config.model.init_std, config.model.init_cutoff)
        yield raw_bytes(convert_float(spec.name, fresh, spec.dtype))


def _card(source: Checkpoint, old: Tokenizer, new: Tokenizer, old_rows: int, rows: int, initial: Initial) -> str:
    how = "drawn from the normal distribution of a new model" if initial == "normal" else "the mean of the old rows"
    return (
        f"# {source.path.name}, with a larger vocabulary\n\n"
        f"Tokenizer: {old.vocab_size:,} pieces before, {new.vocab_size:,} now; old ids are as they were. Embedding "
        f"rows: {old_rows:,} before, {rows:,} now; the new ones are {how} and untrained.\n\n"
        f"Start: `{source.path.name}`, step {source.step}; optimizer state was not taken along.\n"
    )
