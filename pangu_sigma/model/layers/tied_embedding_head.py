"""Output heads: from hidden rows to token losses or logits."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from pangu_sigma.config.model_section import ModelConfig
from parallel.operator_layout import Layout
from parallel.ops.distillation_loss import TiedCrossEntropyAgainst
from parallel.ops.primitives import tied_cross_entropy


class TiedHead(nn.Cell):
    """The word embedding is the output matrix, without a bias.

    `table` is the one of all domains [V, D], or (`per_domain`) [domains, V, D], of which each sample takes its own.
    """

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__()
        self.per_domain = model.domain_parameters.embedding == "own"
        self.cross_entropy = tied_cross_entropy(layout)
        self.cross_entropy_against = TiedCrossEntropyAgainst(layout)
        self.product = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.take = layout(ops.Gather(), (1, 1, 1), ())
        self.concat = layout(ops.Concat(0))

    def construct(self, h: Tensor, labels: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        """h_TD, labels int32 [B, S] -> token losses float32 [B, S]."""
        batch, length = labels.shape
        if not self.per_domain:
            losses = self.cross_entropy(h, table, labels.reshape(-1))[0]
            return losses.reshape(batch, length)
        by_sample = ()
        for b in range(batch):
            rows = h[b * length : (b + 1) * length]
            losses = self.cross_entropy(rows, self.take(table, domain[b], 0), labels[b])[0]
            by_sample = by_sample + (losses.reshape(1, length),)
        return self.concat(by_sample)

    def against(self, h: Tensor, labels: Tensor, domain: Tensor, table: Tensor, previous: Tensor):
        """As the call, with another model's logits [B, S, V]: (token losses, KL(previous || now)) float32 [B, S]."""
        batch, length = labels.shape
        previous = previous.reshape(batch * length, -1)
        if not self.per_domain:
            losses, apart, _, _ = self.cross_entropy_against(h, table, labels.reshape(-1), previous)
            return losses.reshape(batch, length), apart.reshape(batch, length)
        losses, divergence = (), ()
        for b in range(batch):
            rows = slice(b * length, (b + 1) * length)
            own = self.take(table, domain[b], 0)
            loss, apart, _, _ = self.cross_entropy_against(h[rows], own, labels[b], previous[rows])
            losses = losses + (loss.reshape(1, length),)
            divergence = divergence + (apart.reshape(1, length),)
        return self.concat(losses), self.concat(divergence)

    def logits(self, h: Tensor, batch: int, domain: Tensor, table: Tensor) -> Tensor:
        """h_TD -> logits float32 [B, S, V]."""
        length = h.shape[0] // batch
        if not self.per_domain:
            return self.product(h, table).reshape(batch, length, -1)
        by_sample = ()
        for b in range(batch):
            part = self.product(h[b * length : (b + 1) * length], self.take(table, domain[b], 0))
            by_sample = by_sample + (part.reshape(1, length, -1),)
        return self.concat(by_sample)


class UntiedHead(nn.Cell):
    """The output matrix is a table of its own [V, D], `word`, a row for every vocabulary id; without a bias.

    It has `TiedHead`'s methods; the embedding's table, which they are given, does not matter.
    """

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__()
        self.word = Parameter(initializer(Normal(model.init_std), (vocab, model.hidden), ms.float32), name="word")
        self.tied = TiedHead(model, vocab, layout)

    def construct(self, h: Tensor, labels: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        """h_TD, labels int32 [B, S] -> token losses float32 [B, S]."""
        return self.tied(h, labels, domain, self.word)

    def against(self, h: Tensor, labels: Tensor, domain: Tensor, table: Tensor, previous: Tensor):
        """As `TiedHead.against`."""
        return self.tied.against(h, labels, domain, self.word, previous)

    def logits(self, h: Tensor, batch: int, domain: Tensor, table: Tensor) -> Tensor:
        """h_TD -> logits float32 [B, S, V]."""
        return self.tied.logits(h, batch, domain, self.word)


HEADS = {"tied": TiedHead, "untied": UntiedHead}  # by their names in the configuration
