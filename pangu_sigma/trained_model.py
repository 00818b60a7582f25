"""Trained model: built from a run, checkpoint or model folder, ready to evaluate or generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma import runtime
from pangu_sigma.checkpoint import Checkpoint, StoredTensors, resolve
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.checkpoint.folder_layout import CHECKPOINTS, CONFIG, TOKENIZER
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.config.load_config import read_stored
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.plan.requirements import check_loading
from parallel.comm.processes import Processes

if TYPE_CHECKING:
    from pangu_sigma.model.model import Model


@dataclass(frozen=True)
class TrainedModel:
    """Trained model with its tokenizer and its checkpoint; `run_dir` is None where the checkpoint stands alone."""

    model: Model
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    run_dir: Path | None

    def corpus(self, scratch: Path | None = None):
        """The domains' tokenised text; see `stored_corpus`."""
        return stored_corpus(self.checkpoint, self.model.config, self.tokenizer, scratch)


def run_of(checkpoint: Checkpoint) -> Path | None:
    """The folder of the run that a checkpoint lies in; None where it stands alone."""
    return checkpoint.path.parent.parent if checkpoint.path.parent.name == CHECKPOINTS else None


def stored_corpus(checkpoint: Checkpoint, config: Config, tokenizer: Tokenizer, scratch: Path | None = None):
    """The tokenised text of a checkpoint's domains, from its run's cache if it is there.

    Where the model stands alone and its run's cache is gone, the text is tokenised into `scratch`, if given. Raises
    UserError for a changed corpus and for one that is not where the configuration says.
    """
    from pangu_sigma.data.corpus import prepare_corpus

    if scratch is not None:
        config = with_text_cache(config, checkpoint, scratch)
    _check_text_is_here(checkpoint, config)
    corpus = prepare_corpus(config, tokenizer, known_corpora=checkpoint.fingerprints.corpora)
    checkpoint.check_fingerprints(tokenizer=tokenizer.fingerprint, corpora=corpus.fingerprints)
    return corpus


def with_text_cache(config: Config, checkpoint: Checkpoint, scratch: Path) -> Config:
    """The configuration of a checkpoint, by which its text is tokenised into `scratch` where it stands alone and its
    run's cache is gone: not into a model's folder, nor into that of a run which was deleted or is on another machine.
    """
    if run_of(checkpoint) is not None or Path(config.data.cache).is_dir():
        return config
    values = config.to_dict()
    values["data"]["cache"] = str(scratch)
    return config_from_dict(values)


def _check_text_is_here(checkpoint: Checkpoint, config: Config) -> None:
    from pangu_sigma.data.corpus_files import expand_paths
    from pangu_sigma.data.domain_store import find_store

    known = checkpoint.fingerprints
    for domain in config.domains:
        corpus = known.corpora.get(domain.name)
        if corpus is not None and find_store(domain, known.tokenizer, config.data, corpus) is not None:
            continue
        try:
            expand_paths(domain.name, domain.data)
        except UserError as error:
            raise UserError(
                f"{checkpoint.path} is measured on the text that it was trained with, and of domain "
                f"{domain.name} that is not here: put {', '.join(domain.data)} back"
            ) from error


def stored_config(checkpoint: Checkpoint) -> Config:
    """The effective configuration inside a checkpoint. Raises UserError if it does not hold any more."""
    return read_stored(checkpoint.config_text, checkpoint.path / CONFIG)


def stored_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer inside a checkpoint."""
    from pangu_sigma.data.tokenizers.tokenizer_registry import tokenizer_from

    # Of the files in its folder only those count that the manifest lists, checked against their hashes.
    return tokenizer_from(checkpoint.tokenizer_files(), checkpoint.path / TOKENIZER)


def load_trained(path: str | Path) -> TrainedModel:
    """Build the model that a run folder (its last complete checkpoint), a checkpoint or a model folder holds.

    Raises UserError naming what is missing, damaged or changed.
    """
    return trained_from(resolve(path))


@runtime.COMPUTING
def trained_from(
    checkpoint: Checkpoint,
    device: str | None = None,
    precision: str | None = None,
    sequence_length: int | None = None,
    processes: Processes | None = None,
) -> TrainedModel:
    """Build the model of an opened checkpoint, on another device, in another precision or for sequences of another
    length (in tokens) than it was trained with. `processes` that have met build it together, each its own experts.

    Tensors that are stored as float16 or bfloat16 become float32. Raises UserError as `load_trained` does.
    """
    config = stored_config(checkpoint)
    values = config.to_dict()
    values["run"]["device"] = device or values["run"]["device"]
    values["train"]["precision"] = precision or values["train"]["precision"]
    values["data"]["sequence_length"] = sequence_length or values["data"]["sequence_length"]
    # The mesh that trained it is not here: nothing is cut over devices, and `processes` have a mesh of their own.
    values["parallel"] = {}
    config = config_from_dict(values)
    check_loading(config, checkpoint.path, 1 if processes is None else processes.size)
    runtime.prepare(config.run.device)
    from pangu_sigma.model.build_model import build_model
    from pangu_sigma.model.state_dict import restore_model, stored_tables

    tokenizer = stored_tokenizer(checkpoint)
    tensors = stored_weights(checkpoint, alone=processes is None or processes.size == 1)
    tables = stored_tables(tensors) or None
    model = build_model(
        config, config.model.vocab_size, tokenizer.eod_id, tables=tables, initialise=False, inference=True,
        processes=processes,
    )  # fmt: skip
    restore_model(model, tensors)
    return TrainedModel(model, checkpoint, tokenizer, run_of(checkpoint))


def stored_weights(checkpoint: Checkpoint, alone: bool = True) -> Mapping[str, np.ndarray]:
    """All parameters (as float32) and routing tables of a checkpoint, without optimizer state, hash-checked.

    A process that is not `alone` takes a part of them: each tensor is read when it is asked for.
    """
    names = checkpoint.names(optimizer=False)
    if not alone:
        return StoredTensors(checkpoint, names, floats=True)
    return {name: as_float32(name, array) for name, array in checkpoint.load(names).items()}
