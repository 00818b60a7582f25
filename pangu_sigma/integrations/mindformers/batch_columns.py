"""Text and routing of a MindFormers run: what its data loader and its model must agree on."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.config import Config, check_init_from, with_tokenizer_of, with_vocabulary
from pangu_sigma.data.corpus import Corpus, prepare_corpus
from pangu_sigma.model.build_model import build_structure
from pangu_sigma.model.graph_inputs import BATCH_INPUTS, GraphInputs, fixed_arrays, placeholders
from pangu_sigma.model.model_structure import ModelStructure
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.model.state_dict import stored_tables
from pangu_sigma.tensor_names import tensor_name
from pangu_sigma.trained_model import stored_config, stored_tokenizer, stored_weights

NUM_FIXED = len(BATCH_INPUTS)


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


def columns(inputs: GraphInputs) -> list[str]:
    """Names of the columns of a planned batch, in order: `BATCH_INPUTS` (the mask as weights), the routing of every
    sparse layer, and the rows of each expert by layer where a table routes."""
    routing = [tensor_name("routing", str(i)) for i in range(len(inputs.routing_specs()))]
    return [*BATCH_INPUTS, *routing, *(tensor_name(layer.name, "counts") for layer in inputs.layers if layer.planned)]


def row(batch: RoutedBatch, inputs: GraphInputs) -> tuple[np.ndarray, ...]:
    """A planned batch as its columns."""
    counts = [plan.counts.astype(np.int32) for plan in batch.plans if plan is not None]
    return (*fixed_arrays(batch).values(), *inputs.routing_arrays(batch), *counts)


def column_placeholders(inputs: GraphInputs) -> list[Tensor]:
    """Shapes of the columns for compiling; row vectors of composed kernels have dynamic lengths."""
    fixed = inputs.fixed_specs()
    counts = [((layer.slots,), ms.int32, ()) for layer in inputs.layers if layer.planned]
    return placeholders([*(fixed[name] for name in BATCH_INPUTS), *inputs.routing_specs(), *counts])


def split_columns(columns: tuple, num_routing: int) -> tuple:
    """In a graph: columns -> (`BATCH_INPUTS`, routing inputs, counts)."""
    end = NUM_FIXED + num_routing
    return columns[:NUM_FIXED], columns[NUM_FIXED:end], columns[end:]
