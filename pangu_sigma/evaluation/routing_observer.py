"""Which experts held-out tokens take: from the tables where they decide, from the running model where a gate does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.evaluation.domain_evaluation import Evaluator
from pangu_sigma.model.model import Model


@dataclass(frozen=True)
class Observation:
    """Of one domain's text: `token_ids` int [T], and `hits` bool [T, E] of every sparse layer by its name."""

    token_ids: np.ndarray
    hits: dict[str, np.ndarray]


class Observer:
    """Observes a model's routing in evaluation (nothing is dropped) on the first `tokens` of every domain's text.

    A model that is observed serves nothing else: its gates tell choices where they else tell counts.
    """

    def __init__(self, model: Model, batch_size: int, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        self.layer_names = model.config.model.sparse_prefixes
        for layer_name, router in zip(self.layer_names, model.routers, strict=True):
            if router.learned:
                model.net.gate(layer_name).tells_choices = True
        self.evaluator = Evaluator(model, batch_size)

    def batches(self, heldout: HeldoutSequences) -> int:
        """Number of batches that `observe` takes of a text."""
        wanted = -(-self.tokens // (self.evaluator.batch_size * heldout.sequence_length))
        return self.evaluator.batches(heldout, wanted)

    def observe(
        self, heldout: Mapping[str, HeldoutSequences], advance: Callable[[int], None] | None = None
    ) -> dict[str, Observation]:
        """Domain -> what its text takes under its own experts; `advance(1)` is called after each batch."""
        return {name: self._domain(name, text, advance) for name, text in heldout.items()}

    def _domain(self, name: str, text: HeldoutSequences, advance: Callable[[int], None] | None) -> Observation:
        size = self.evaluator.batch_size
        ids_seen, hits = [], {layer_name: [] for layer_name in self.layer_names}
        for number in range(self.batches(text)):
            ids, mask = text.batch(number * size, size)
            present = (mask > 0).reshape(-1)
            inputs = ids[:, :-1]
            ids_seen.append(inputs.reshape(-1)[present])
            for layer_name, found in zip(self.layer_names, self._hits(name, ids, mask, number * size), strict=True):
                hits[layer_name].append(found[present])
            if advance:
                advance(1)
        return Observation(
            np.concatenate(ids_seen)[: self.tokens],
            {layer_name: np.concatenate(found)[: self.tokens] for layer_name, found in hits.items()},
        )

    def _hits(self, name: str, ids: np.ndarray, mask: np.ndarray, first: int) -> list[np.ndarray]:
        """bool [T, E] of every sparse layer."""
        if self.model.learned:
            _, counts = self.evaluator.outputs(ids, mask, name, first)
            return [c.asnumpy() > 0 for c in counts]
        groups = self.model.groups
        domain = np.full(len(ids), groups.names.index(name), np.int32)
        found = []
        for router in self.model.routers:
            samples = np.arange(first, first + len(ids))
            chosen = router.assign(ids[:, :-1], domain, 0, samples, training=False).expert_ids
            hits = np.zeros((len(chosen), groups.total), bool)
            np.put_along_axis(hits, chosen, True, axis=1)
            found.append(hits)
        return found
