"""Text and routing of a MindFormers run: what its data loader and its model must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mindspore as ms
import numpy as np

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.config import Config, check_init_from, with_tokenizer_of, with_vocabulary
from pangu_sigma.data.corpus import Corpus, prepare_corpus
from pangu_sigma.model.batch_planner import RoutedBatch, graph_placeholders
from pangu_sigma.model.build_model import build_structure
from pangu_sigma.model.graph_inputs import GraphSignature, LayerSignature
from pangu_sigma.model.model_structure import ModelStructure
from pangu_sigma.model.state_dict import stored_tables
from pangu_sigma.tensor_names import tensor_name
from pangu_sigma.trained_model import stored_config, stored_tokenizer, stored_weights

# Every planned batch begins with these columns; the routing of each sparse layer follows.
FIXED_COLUMNS = ("tokens", "labels", "mask", "positions", "segments", "domain", "keys")


@dataclass(frozen=True)
class Text:
    """The run's text with what its model begins from: `weights` of `run.init_from`, or None for a new model."""

    config: Config
    corpus: Corpus
    start: Checkpoint | None
    weights: dict[str, np.ndarray] | None

    @property
    def tables(self) -> dict[str, dict[str, np.ndarray]] | None:
        """The routing tables of the model that the run begins with, None for a new one."""
        return stored_tables(self.weights) if self.weights else None

    @property
    def token_counts(self) -> dict[str, np.ndarray]:
        """Token counts [V] by domain."""
        return self.corpus.token_counts(self.config.model.vocab_size)


def open_text(config: Config) -> Text:
    """Tokenizer and token stores of `config`, made or found as our own trainer does. Raises UserError."""
    start = resolve(config.run.init_from) if config.run.init_from else None
    if start is not None:
        model = stored_config(start)
        check_init_from(model, config)
        config = with_tokenizer_of(config, model)
    corpus = prepare_corpus(config, stored_tokenizer(start) if start else None)
    config = with_vocabulary(config, corpus.tokenizer.vocab_size)
    return Text(config, corpus, start, stored_weights(start) if start else None)


def structure_of(text: Text) -> ModelStructure:
    """What planning a batch needs; every step takes all experts, which MindFormers keeps in the network."""
    vocab, eod_id = text.config.model.vocab_size, text.corpus.tokenizer.eod_id
    return build_structure(text.config, vocab, eod_id, text.tables, text.token_counts)


def columns(signature: GraphSignature) -> list[str]:
    """Names of the columns of a planned batch, in order."""
    return [*FIXED_COLUMNS, *(name for layer_signature in signature.layers for name in _layer_columns(layer_signature))]


def row(batch: RoutedBatch, signature: GraphSignature) -> tuple[np.ndarray, ...]:
    """A planned batch as its columns."""
    arrays = [batch.tokens, batch.labels, batch.mask, batch.positions, batch.segments, batch.domain, batch.keys]
    for layer_signature, plan, noise in zip(signature.layers, batch.plans, batch.noise, strict=True):
        if plan is None:
            arrays += [noise] if layer_signature.noise else []
        else:
            parts = (plan.order, plan.offsets) if layer_signature.compiled else (*plan.rows, plan.position)
            arrays += [*parts, plan.counts.astype(np.int32)]
    return tuple(arrays)


def placeholders(signature: GraphSignature) -> list[ms.Tensor]:
    """Shapes of the columns for compiling; row vectors of composed kernels have dynamic lengths."""
    fixed = graph_placeholders(signature.batch, signature.length)
    tensors = [fixed["weights" if name == "mask" else name] for name in FIXED_COLUMNS]
    tokens = signature.batch * signature.length
    for layer_signature in signature.layers:
        if layer_signature.learned:
            tensors += [ms.Tensor(shape=list(layer_signature.noise), dtype=ms.float32)] if layer_signature.noise else []
            continue
        if layer_signature.compiled:
            tensors += [ms.Tensor(shape=[n], dtype=ms.int32) for n in (tokens, layer_signature.slots + 1)]
        else:
            tensors += [ms.Tensor(shape=[None], dtype=ms.int32) for _ in range(layer_signature.slots + 1)]
            tensors.append(ms.Tensor(shape=[tokens, 1], dtype=ms.int32))
        tensors.append(ms.Tensor(shape=[layer_signature.slots], dtype=ms.int32))
    return tensors


def _layer_columns(layer_signature: LayerSignature) -> Iterator[str]:
    routing = layer_signature.routing
    yield from (tensor_name(layer_signature.name, "routing", str(i)) for i in range(routing))
    if not layer_signature.learned:
        yield tensor_name(layer_signature.name, "counts")
