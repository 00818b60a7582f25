"""Writing the model folder that a conversion makes: tensors one at a time, progress shown, the card beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu_sigma.checkpoint import Checkpoint, StreamedCheckpoint, TensorSpec, write_model_folder
from pangu_sigma.checkpoint.model_folder import CARD
from pangu_sigma.config import SCHEMA_VERSION, Config, config_from_dict, effective, tensor_shapes
from pangu_sigma.monitor.progress import progress
from pangu_sigma.signals import sigterm_as_ctrl_c
from pangu_sigma.tensor_names import is_routing


def write_converted(
    out: Path, config: Config, what: str, *, origin: Mapping[str, Any], card: str, **contents: Any
) -> Checkpoint:
    """Writes the model of `config` to `out` under a bar named `what`; an interruption leaves nothing behind.

    origin: where the model came from, anything that JSON holds. contents: what else a `StreamedCheckpoint` has; its
    tensors, domains and coverage are the configuration's where nothing else is given. Raises UserError.
    """
    given = {
        "tensors": new_specs(tensor_shapes(config, config.model.vocab_size)),
        "domains": config.domain_names,
        "coverage": config.coverage,
        **contents,
    }
    content = StreamedCheckpoint(
        config_text=config.to_yaml(), state={"origin": origin}, documents={CARD: card}, **given
    )
    with sigterm_as_ctrl_c(), progress(what, content.bytes, unit="B") as job:
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


def imported_config(
    model: dict[str, Any], source: str, out: Path, settings: ImportSettings, learning_rate: float, experts: int = 1
) -> Config:
    """The configuration of a model of one domain that is imported from `source`: its section `model`, and its place."""
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
