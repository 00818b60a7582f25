"""Embeddings: words, and the query layer's table of next positions.

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary, P positions of a table.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from pangu_sigma.config.model_section import ModelConfig
from parallel.operator_layout import Layout
from parallel.ops.primitives import embedding_lookup


def embedding_table(rows: int, model: ModelConfig, name: str) -> Parameter:
    """A trained table [rows, D]."""
    return Parameter(initializer(Normal(model.init_std), (rows, model.hidden), ms.float32), name=name)


class NextPositionQueries(nn.Cell):
    """Queries of PanGu-alpha's query layer: position ids [T] -> rows [T, D] of a table of its own [P, D]; at position n
    it asks for token n + 1."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.query = embedding_table(model.positions, model, "query")
        self.lookup = embedding_lookup(layout)

    def construct(self, ids: Tensor) -> Tensor:
        return self.lookup(self.query, ids)


class WordEmbedding(nn.Cell):
    """Word embedding: tokens int32 [B, S], domain [B], table -> rows [T, D].

    `table` is the parameter `word` [V, D], or (`per_domain`) one table for each domain [domains, V, D], which comes as
    an input of the graph because it belongs to the domains and lives in the store; in place of it and of `domain` there
    may be a tuple of every sample's table.
    """

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__()
        self.per_domain = model.domain_parameters.embedding == "own"
        self.vocab = vocab
        if not self.per_domain:
            self.word = embedding_table(vocab, model, "word")
        self.lookup = embedding_lookup(layout, "tensor")
        self.concat = layout(ops.Concat(0))

    def construct(self, tokens: Tensor, domain: Tensor | None, table) -> Tensor:
        if not self.per_domain:
            return self.lookup(table, tokens.reshape(-1))
        if domain is None:
            rows = ()
            for i, of_sample in enumerate(table):
                rows = rows + (self.lookup(of_sample, tokens[i]),)
            return self.concat(rows)
        ids = (tokens + domain.reshape(-1, 1) * self.vocab).reshape(-1)
        return self.lookup(table.reshape(-1, table.shape[-1]), ids)
