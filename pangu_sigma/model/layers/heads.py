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

    def table_of(self, table, domain: Tensor | None, sample: int) -> Tensor:
        """The word table [V, D] of a sample where domains have their own."""
        return table[sample] if domain is None else self.take(table, domain[sample], 0)

    def construct(self, h_TD: Tensor, labels: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        """h_TD, labels int32 [B, S] -> token losses -log p(label) float32 [B, S], in nats."""
        batch, length = labels.shape
        if not self.per_domain:
            losses_T = self.cross_entropy(h_TD, table, labels.reshape(-1))[0]
            return losses_T.reshape(batch, length)
        by_sample = ()
        for b in range(batch):
            h_SD, table_VD = h_TD[b * length : (b + 1) * length], self.table_of(table, domain, b)
            losses_S = self.cross_entropy(h_SD, table_VD, labels[b])[0]
            by_sample = by_sample + (losses_S.reshape(1, length),)
        return self.concat(by_sample)

    def against(self, h_TD: Tensor, labels: Tensor, domain: Tensor, table: Tensor, previous: Tensor):
        """As the call, with another model's logits `previous` [B, S, V] for distillation: (token losses,
        KL(previous || this model)) float32 [B, S]."""
        batch, length = labels.shape
        previous_TV = previous.reshape(batch * length, -1)
        if not self.per_domain:
            losses_T, divergence_T, _, _ = self.cross_entropy_against(h_TD, table, labels.reshape(-1), previous_TV)
            return losses_T.reshape(batch, length), divergence_T.reshape(batch, length)
        losses, divergences = (), ()
        for b in range(batch):
            rows = slice(b * length, (b + 1) * length)
            table_VD = self.table_of(table, domain, b)
            losses_S, divergence_S, _, _ = self.cross_entropy_against(
                h_TD[rows], table_VD, labels[b], previous_TV[rows]
            )
            losses = losses + (losses_S.reshape(1, length),)
            divergences = divergences + (divergence_S.reshape(1, length),)
        return self.concat(losses), self.concat(divergences)

    def select(self, h_TD: Tensor, tokens: Tensor) -> Tensor:
        """The rows of some of the T tokens, by their numbers int32 [n]."""
        return self.rows(h_TD, tokens, 0)

    def logits(self, h_TD: Tensor, batch: int, domain: Tensor | None, table) -> Tensor:
        """h_TD of `batch` samples -> logits float32 [B, S, V]."""
        length = h_TD.shape[0] // batch
        if not self.per_domain:
            return self.product(h_TD, table).reshape(batch, length, -1)
        by_sample = ()
        for b in range(batch):
            logits_SV = self.product(h_TD[b * length : (b + 1) * length], self.table_of(table, domain, b))
            by_sample = by_sample + (logits_SV.reshape(1, length, -1),)
        return self.concat(by_sample)


class UntiedHead(nn.Cell):
    """Untied head: the output matrix is a parameter of its own, `word` [V, D]; without a bias.

    It has `TiedHead`'s methods; the embedding's table, which they are given, does not matter.
    """

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__()
        self.word = embedding_table(vocab, model, "word")
        self.tied = TiedHead(model, vocab, layout)

    def construct(self, h_TD: Tensor, labels: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        """h_TD, labels int32 [B, S] -> token losses float32 [B, S]."""
        return self.tied(h_TD, labels, domain, self.word)

    def against(self, h_TD: Tensor, labels: Tensor, domain: Tensor, table: Tensor, previous: Tensor):
        """As `TiedHead.against`."""
        return self.tied.against(h_TD, labels, domain, self.word, previous)

    def select(self, h_TD: Tensor, tokens: Tensor) -> Tensor:
        """As `TiedHead.select`."""
        return self.tied.select(h_TD, tokens)

    def logits(self, h_TD: Tensor, batch: int, domain: Tensor | None, table) -> Tensor:
        """h_TD -> logits float32 [B, S, V]."""
        return self.tied.logits(h_TD, batch, domain, self.word)
