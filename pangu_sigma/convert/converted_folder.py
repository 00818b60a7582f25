"""Writing the model folder that a conversion makes: tensors one at a time, progress shown, the card beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu_sigma.checkpoint import Checkpoint, Fingerprints, StreamedCheckpoint, TensorSpec, write_model_folder
from pangu_sigma.checkpoint.model_folder import CARD
from pangu_sigma.config import SCHEMA_VERSION, Config, config_from_dict, effective, parameter_counts, tensor_shapes
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_registry import read_model, tokenizer_class
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress
from pangu_sigma.signals import stop_signals_raise
from pangu_sigma.tensor_names import is_routing


@dataclass(frozen=True, repr=False)
class ConvertedModel:
    """A model folder that an import or a conversion wrote; stands for its folder wherever a path is asked for.

    checkpoint: the folder, opened. config: the model's configuration.
    """

    checkpoint: Checkpoint
    config: Config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, num_parameters={self.num_parameters:,})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The model's folder."""
        return self.checkpoint.path

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it has."""
        return self.config.domain_names

    @property
    def num_parameters(self) -> int:
        """Its trained values."""
        return parameter_counts(self.config, self.config.model.vocab_size).total


def write_converted(
    out: Path, config: Config, what: str, *, origin: Mapping[str, Any], card: str, **contents: Any
) -> Checkpoint:
    """Writes the model of `config` to `out` under a bar named `what`; an interruption leaves nothing behind.

    origin: where the model came from, anything that JSON holds. contents: what else a `StreamedCheckpoint` has; its
    tensors, domains and coverage are the configuration's where nothing else is given. Raises UserError.
    """
    vocabulary = config.model.vocab_size
    assert vocabulary is not None  # written by every conversion
    given = {
        "tensors": new_specs(tensor_shapes(config, vocabulary)),
        "domains": config.domain_names,
        "coverage": config.coverage,
        **contents,
    }
    text = stored_text(config, out, is_model=True)
    content = StreamedCheckpoint(config_text=text, state={"origin": origin}, documents={CARD: card}, **given)
    with stop_signals_raise(), progress(what, content.bytes, unit="B") as job:
        return write_model_folder(out, content, progress=lambda done, total: job.set(done))


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What an import cannot read off its source.

    tokenizer_kind: of the source's tokenizer. eod_id: None takes what the source or the tokenizer names. data: texts of
    the model's one domain, for a later evaluation; they need not exist yet.
    """

    tokenizer_kind: str
    eod_id: int | None = None
    domain: str = "general"
    data: tuple[str, ...] = ()


def open_tokenizer(path: Path, settings: ImportSettings, advice: str, eod_id: int | None) -> Tokenizer:
    """The tokenizer of an import. Raises UserError for one that cannot be read, with `advice`, or lacks the id."""
    try:
        model = read_model(path, settings.tokenizer_kind)
    except UserError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {advice}") from error
    return tokenizer_class(settings.tokenizer_kind)(model, eod_id=eod_id, origin=str(path))


def tokenizer_contents(tokenizer: Tokenizer, corpora: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a `StreamedCheckpoint` has of a tokenizer, and of the texts with these fingerprints."""
    fingerprints = Fingerprints(tokenizer=tokenizer.fingerprint, corpora=dict(corpora or {}))
    return {"tokenizer_files": tokenizer.files(), "fingerprints": fingerprints}


def imported_config(
    model: dict[str, Any], source: str, out: Path, settings: ImportSettings, tokenizer: Tokenizer,
    learning_rate: float, experts: int = 1,
) -> Config:  # fmt: skip
    """The configuration of a model of one domain that is imported from `source`: its section `model`, and its place.

    Raises UserError where the tokenizer has more pieces than the model embeddings.
    """
    if tokenizer.vocab_size > model["vocab_size"]:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, and {source} has embeddings for {model['vocab_size']}: "
            "give the tokenizer that the model was trained with"
        )
    values = {
        "schema_version": SCHEMA_VERSION,
        "run": {"dir": str(out)},
        "model": model,
        "domains": [
            {
                "name": settings.domain,
                "data": list(settings.data) or [str(out / f"{settings.domain}.jsonl")],
                "experts": experts,
            }
        ],
        "data": {
            "tokenizer": {"kind": settings.tokenizer_kind, "path": str(out / "tokenizer" / "tokenizer.model")},
            "sequence_length": model["positions"],
        },
        # Nothing trains here; a training that starts from the folder brings its own.
        "optimizer": {"learning_rate": learning_rate},
        "train": {"steps": 1, "batch_size": 1},
    }
    return effective(config_from_dict(values, source=f"the model of {source}"))


def new_specs(shapes: Mapping[str, tuple[int, ...]]) -> list[TensorSpec]:
    """How the tensors of `shapes` are stored in a new model: routing tables as int32, all others as float32."""
    return [TensorSpec(name, "int32" if is_routing(name) else "float32", shape) for name, shape in shapes.items()]
