"""Language-model heads (`config.parts.head_specs`): tied (the word embedding is the output matrix) and untied; from
hidden rows to token losses or logits.

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.embedding import embedding_table
from parallel.operator_layout import Layout
from parallel.ops.distillation_loss import TiedCrossEntropyAgainst
from parallel.ops.primitives import tied_cross_entropy


class TiedHead(nn.Cell):
    """Tied embedding: the word embedding is the output matrix, without a bias.

    `table` is the one of all domains [V, D], or (`per_domain`) [domains, V, D], of which each sample takes its own; in
    place of these and of `domain` there may be a tuple of every sample's table.
    """

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__()
        self.per_domain = model.domain_parameters.embedding == "own"
        self.cross_entropy = tied_cross_entropy(layout)
        self.cross_entropy_against = TiedCrossEntropyAgainst(layout)
        self.product = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.take = layout(ops.Gather(), (1, 1, 1), ())
        self.concat = layout(ops.Concat(0))
        self.rows = layout(ops.Gather(), (1, 1), (1,))

    def matrices(self, table, domain: Tensor | None, batch: int) -> tuple[Tensor, ...]:
        """The output matrix [V, D] of all samples, or where domains have their own that of each."""
        if not self.per_domain:
            return (table,)
        if domain is None:
            return table
        by_sample = ()
        for b in range(batch):
            by_sample = by_sample + (self.take(table, domain[b], 0),)
        return by_sample

    def split(self, rows: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Rows [T, …] as `matrices` are of them: all, or of each sample."""
        if not self.per_domain:
            return (rows,)
        length, by_sample = rows.shape[0] // batch, ()
        for b in range(batch):
            by_sample = by_sample + (rows[b * length : (b + 1) * length],)
        return by_sample

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """What `split` took apart."""
        return self.concat(parts) if self.per_domain else parts[0]

    def construct(self, h_TD: Tensor, labels: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        """h_TD, labels int32 [B, S] -> token losses -log p(label) float32 [B, S], in nats."""
        batch, losses = labels.shape[0], ()
        h, labels_of = self.split(h_TD, batch), self.split(labels.reshape(-1), batch)
        for i, matrix in enumerate(self.matrices(table, domain, batch)):
            losses = losses + (self.cross_entropy(h[i], matrix, labels_of[i])[0],)
        return self.join(losses).reshape(labels.shape)

    def against(self, h_TD: Tensor, labels: Tensor, domain: Tensor, table: Tensor, previous: Tensor):
        """As the call, with another model's logits `previous` [B, S, V] for distillation: (token losses,
        KL(previous || this model)) float32 [B, S]."""
        batch, losses, divergences = labels.shape[0], (), ()
        h, labels_of = self.split(h_TD, batch), self.split(labels.reshape(-1), batch)
        previous_of = self.split(previous.reshape(h_TD.shape[0], -1), batch)
        for i, matrix in enumerate(self.matrices(table, domain, batch)):
            of_part = self.cross_entropy_against(h[i], matrix, labels_of[i], previous_of[i])
            losses, divergences = losses + (of_part[0],), divergences + (of_part[1],)
        return self.join(losses).reshape(labels.shape), self.join(divergences).reshape(labels.shape)

    def select(self, h_TD: Tensor, tokens: Tensor) -> Tensor:
        """The rows of some of the T tokens, by their numbers int32 [n]."""
        return self.rows(h_TD, tokens, 0)

    def logits(self, h_TD: Tensor, batch: int, domain: Tensor | None, table) -> Tensor:
        """h_TD of `batch` samples -> logits float32 [B, S, V]."""
        h, logits = self.split(h_TD, batch), ()
        for i, matrix in enumerate(self.matrices(table, domain, batch)):
            logits = logits + (self.product(h[i], matrix),)
        return self.join(logits).reshape(batch, h_TD.shape[0] // batch, -1)


class UntiedHead(TiedHead):
    """Untied head: the output matrix is a parameter of its own, `word` [V, D]; without a bias. The embedding's table,
    which it is given, does not matter."""

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__(model, vocab, layout)
        self.word = embedding_table(vocab, model, "word")

    def matrices(self, table, domain: Tensor | None, batch: int) -> tuple[Tensor, ...]:
        """The one output matrix [V, D]."""
        return (self.word,)
