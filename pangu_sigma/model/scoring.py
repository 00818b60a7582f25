"""Scorer: token losses and logits of given rows, as evaluation and generation compute them, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor

from pangu_sigma.errors import UserError
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.forward_pass import ForwardPass, HeadOutput, Logits, TokenLosses
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from rre.store.disk_store import StoreFull


class Scorer:
    """Forward passes for evaluation: scores rows of S + 1 tokens, `rows` at a time, which belong to at most `domains`
    domains.

    Nothing is dropped, routing follows the tables and rows are cut into fixed blocks, so a row's figures do not depend
    on what stands in the others. A graph is compiled when it is first asked for.

    Processes that share the model are given the same rows and each gives the figures of its part of them, in order.
    """

    def __init__(self, model: Model, rows: int, domains: int = 1) -> None:
        self.model, self.rows = model, rows
        self.inputs = model.evaluation_inputs(rows // model.processes.mesh.rows, domains)
        self.planner = BatchPlanner(model, self.inputs, training=False)
        self._graphs: dict[type[HeadOutput], ForwardPass] = {}

    @property
    def length(self) -> int:
        """S."""
        return self.inputs.length

    def losses(self, tokens: np.ndarray, domain: Sequence[int] | np.ndarray) -> np.ndarray:
        """-log p of every token but the first, given those before it in its document: float32 [b, S], in nats.

        tokens int32 [B, S + 1], domain [B] as the model numbers its domains, B = `rows`; b of them are this process's,
        all where it is alone. Raises UserError where the batch activates more experts than memory may hold.
        """
        return self._run(TokenLosses, self.plan(tokens, domain)).asnumpy()

    def logits(self, tokens: np.ndarray, domain: Sequence[int] | np.ndarray) -> Tensor:
        """Logits after every token but the last: float32 [b, S, V]; arguments and errors as of `losses`."""
        return self._run(Logits, self.plan(tokens, domain))

    def _run(self, output: type[HeadOutput], planned: RoutedBatch) -> Tensor:
        if output not in self._graphs:
            net = self.model.net
            self._graphs[output] = ForwardPass(net, self.inputs, output(net.head))
            self._graphs[output].set_inputs(*self.inputs.placeholders())
        # The network may be shared with a training step, so its mode is set per use.
        return self._graphs[output].set_train(False)(*self.pack(planned))

    def plan(self, tokens: np.ndarray, domain: Sequence[int] | np.ndarray) -> RoutedBatch:
        """The inputs of token rows int32 [B, S + 1] of `domain` [B]."""
        reads = self.planner.reads
        return self.planner(tokens[reads], np.asarray(domain, np.int32)[reads], reads, 0)

    def pack(self, planned: RoutedBatch) -> list[Tensor]:
        """The inputs of a graph for a planned batch. Raises UserError as `losses` does."""
        try:
            return self.inputs.pack(planned, self.model.store)
        except StoreFull as error:
            raise UserError(f"a batch of {self.rows} sequences: {error}") from error
