"""One row of the matrix: every domain's held-out loss under one model, its own experts given or inferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.evaluation.inferred_domains import DomainLikelihood, InferredDomainLoss, accuracy_after
from pangu_sigma.lifelong.lifelong_config import InferenceConfig
from pangu_sigma.model.model import Model

# How a domain's loss came about: with its own experts, with inferred ones, or by a model that has no groups.
OWN, AUTO, ANY = "own", "auto", "any"
# It was not measured, or is that of the stage before, since every parameter that it depends on has its hash still.
SKIPPED, UNCHANGED = "skipped", "unchanged"
NOT_MEASURED = {"loss": None, "how": SKIPPED, "tokens": 0, "auto": None, "accuracy": {}}


class RowMeasurement:
    """Measures one model; the same text in the same batches gives the same figures to the bit, whatever it stores.

    by_domain: whether a text is read by the experts of its domain. batches: most of them per domain. own_only: a text
    is read by its domain's own experts alone, and is not measured where there are none.
    """

    def __init__(
        self,
        model: Model,
        by_domain: bool,
        inference: InferenceConfig,
        batches: int,
        batch_size: int,
        own_only: bool = False,
    ) -> None:
        self.model, self.by_domain, self.inference = model, by_domain, inference
        self.batches, self.batch_size, self.own_only = batches, batch_size, own_only
        self.likelihood = DomainLikelihood(model, batch_size)

    def work(self, heldout: Mapping[str, HeldoutSequences]) -> int:
        """Number of steps that `row` takes."""
        return sum(self._count(texts) for name, texts in heldout.items() if self._is_measured(name))

    def row(self, heldout: Mapping[str, HeldoutSequences], advance: Callable[[int], None]) -> dict[str, dict]:
        """Domain -> {"loss", "how", "tokens", "auto", "accuracy"}; losses in nats per token.

        `auto` is the loss with the domain inferred, `accuracy` how often it was the right one after so many tokens
        (None where the model has no group of the domain, or no groups at all). What is not measured is NOT_MEASURED.
        """
        return {
            name: self._domain(name, texts, advance) if self._is_measured(name) else NOT_MEASURED
            for name, texts in heldout.items()
        }

    def _is_measured(self, name: str) -> bool:
        return not (self.own_only and self.by_domain) or name in self.model.groups.names

    def _domain(self, name: str, texts: HeldoutSequences, advance: Callable[[int], None]) -> dict:
        names = self.model.groups.names
        own, read_by = names.index(name) if name in names else None, range(len(names))
        after, how = accuracy_after(texts.sequence_length), AUTO if own is None else OWN
        if not self.by_domain:
            read_by, own, after, how = [own or 0], 0, (), ANY
        elif self.own_only:
            assert own is not None
            read_by, own, after = [own], 0, ()
        top = min(self.inference.top, len(read_by))
        text = InferredDomainLoss(len(read_by), own, self.inference.prior, top, after)
        for sequence in self.likelihood.sequences(texts, self._count(texts), advance, read_by):
            text.add(sequence)
        result = text.result()
        return {
            "loss": result["auto"] if own is None else result["given"],
            "how": how,
            "tokens": result["tokens"],
            "auto": result["auto"] if self.by_domain and not self.own_only else None,
            "accuracy": {str(n): share for n, share in result["accuracy"].items()},
        }

    def _count(self, texts: HeldoutSequences) -> int:
        return min(self.batches, -(-len(texts) // self.batch_size))
