"""Routing observer: which experts held-out tokens take, read from routing tables or from the running model's gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.evaluation.domain_evaluation import Evaluator
from pangu_sigma.model.model import Model


@dataclass(frozen=True)
class RoutingObservation:
    """Routing of one domain's text: `token_ids` int [T], and `hits` bool [T, E] of every sparse layer by its name."""

    token_ids: np.ndarray
    hits: dict[str, np.ndarray]


class RoutingObserver:
    """Observer of a model's routing in evaluation (nothing is dropped) on the first `tokens` of every domain's text.

    A model that is observed serves nothing else: its gates return assignments instead of counts.
    """

    def __init__(self, model: Model, batch_size: int, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        self.sparse_layers = model.config.model.sparse_prefixes
        for layer_name, router in zip(self.sparse_layers, model.routers, strict=True):
            if router.learned:
                model.net.gate(layer_name).return_assignments = True
        self.evaluator = Evaluator(model, batch_size)

    def batches(self, heldout: HeldoutSequences) -> int:
        """Number of batches that `observe` takes of a text."""
        batches = -(-self.tokens // (self.evaluator.batch_size * heldout.sequence_length))
        return self.evaluator.batches(heldout, batches)

    def observe(
        self, heldout: Mapping[str, HeldoutSequences], advance: Callable[[int], None] | None = None
    ) -> dict[str, RoutingObservation]:
        """Domain -> routing of its text under its own experts; `advance(1)` is called after each batch."""
        return {name: self._domain(name, text, advance) for name, text in heldout.items()}

    def _domain(self, name: str, text: HeldoutSequences, advance: Callable[[int], None] | None) -> RoutingObservation:
        size = self.evaluator.batch_size
        ids_seen, hits = [], {layer_name: [] for layer_name in self.sparse_layers}
        for batch in range(self.batches(text)):
            ids, mask = text.batch(batch * size, size)
            present = (mask > 0).reshape(-1)
            inputs = ids[:, :-1]
            ids_seen.append(inputs.reshape(-1)[present])
            for layer_name, taken in zip(self.sparse_layers, self._hits(name, ids, mask, batch * size), strict=True):
                hits[layer_name].append(taken[present])
            if advance:
                advance(1)
        return RoutingObservation(
            np.concatenate(ids_seen)[: self.tokens],
            {layer_name: np.concatenate(parts)[: self.tokens] for layer_name, parts in hits.items()},
        )

    def _hits(self, name: str, ids: np.ndarray, mask: np.ndarray, first: int) -> list[np.ndarray]:
        """bool [T, E] of every sparse layer."""
        if self.model.learned:
            _, counts = self.evaluator.outputs(ids, mask, name, first)
            return [c.asnumpy() > 0 for c in counts]
        groups = self.model.groups
        domain = np.full(len(ids), groups.names.index(name), np.int32)
        by_layer = []
        for router in self.model.routers:
            samples = np.arange(first, first + len(ids))
            chosen = router.assign(ids[:, :-1], domain, 0, samples, training=False)
            hits = np.zeros((len(chosen), groups.total), bool)
            np.put_along_axis(hits, chosen, True, axis=1)
            by_layer.append(hits)
        return by_layer
