"""Scorer: token losses and logits of given rows, as evaluation and generation compute them, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor

from pangu_sigma.errors import UserError
from pangu_sigma.model.batch_planner import BatchPlanner, RoutedBatch, graph_placeholders
from pangu_sigma.model.model import Model
from pangu_sigma.model.pangu import Logits, TokenLosses
from rre.store.disk_store import StoreFull

_INPUTS = ("tokens", "positions", "segments", "domain", "keys")


class Scorer:
    """Forward passes for evaluation: scores rows of S + 1 tokens, `rows` at a time, which belong to at most `domains`
    domains.

    Nothing is dropped, routing follows the tables and rows are cut into fixed blocks, so a row's figures do not depend
    on what stands in the others. A graph is compiled when it is first asked for.

    Processes that share the model are given the same rows and each gives the figures of its part of them, in order.
    """

    def __init__(self, model: Model, rows: int, domains: int = 1) -> None:
        self.model, self.rows = model, rows
        self.signature = model.evaluation_signature(rows // model.processes.mesh.rows, domains)
        self.planner = BatchPlanner(model, self.signature, training=False)
        self._losses: TokenLosses | None = None
        self._logits: Logits | None = None

    @property
    def length(self) -> int:
        """S."""
        return self.signature.length

    def losses(self, tokens: np.ndarray, domain: Sequence[int] | np.ndarray) -> np.ndarray:
        """-log p of every token but the first, given those before it in its document: float32 [b, S], in nats.

        tokens int32 [B, S + 1], domain [B] as the model numbers its domains, B = `rows`; b of them are this process's,
        all where it is alone. Raises UserError where the batch activates more experts than memory may hold.
        """
        if self._losses is None:
            self._losses = TokenLosses(self.model.net, self.signature)
            self._compile(self._losses, (*_INPUTS[:1], "labels", *_INPUTS[1:]))
        planned = self.plan(tokens, domain)
        fixed = planned.fixed
        # The network may be shared with a training step, so its mode is set per use.
        self._losses.set_train(False)
        return self._losses(fixed[0], Tensor(planned.labels), *fixed[1:], *self.flat(planned)).asnumpy()

    def logits(self, tokens: np.ndarray, domain: Sequence[int] | np.ndarray) -> Tensor:
        """Logits after every token but the last: float32 [b, S, V]; arguments and errors as of `losses`."""
        if self._logits is None:
            self._logits = Logits(self.model.net, self.signature)
            self._compile(self._logits, _INPUTS)
        planned = self.plan(tokens, domain)
        self._logits.set_train(False)
        return self._logits(*planned.fixed, *self.flat(planned))

    def _compile(self, graph, names: Sequence[str]) -> None:
        placeholders = graph_placeholders(self.signature.batch, self.length)
        graph.set_inputs(*(placeholders[name] for name in names), *self.signature.placeholders())

    def plan(self, tokens: np.ndarray, domain: Sequence[int] | np.ndarray) -> RoutedBatch:
        """The inputs of token rows int32 [B, S + 1] of `domain` [B]."""
        reads = self.planner.reads
        return self.planner(tokens[reads], np.asarray(domain, np.int32)[reads], reads, 0)

    def flat(self, planned: RoutedBatch) -> list[Tensor]:
        """The variable inputs of a graph of this signature. Raises UserError as `losses` does."""
        try:
            return planned.flat(self.signature, self.model.store)
        except StoreFull as error:
            raise UserError(f"a batch of {self.rows} sequences: {error}") from error
