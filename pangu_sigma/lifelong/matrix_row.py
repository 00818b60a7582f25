"""One row of the matrix: every domain's held-out loss under one model, its own experts given or inferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.evaluation.inferred_domains import DomainLikelihood, InferredDomainLoss, accuracy_after
from pangu_sigma.lifelong.lifelong_config import InferenceConfig
from pangu_sigma.model.model import Model

# How a domain's loss came about: with its own experts, with inferred ones, or by a model that has no groups.
OWN, AUTO, ANY = "own", "auto", "any"


class RowMeasurement:
    """Measures one model; the same text in the same batches gives the same figures to the bit, whatever it stores.

    by_domain: whether a text is read by the experts of its domain. batches: most of them per domain.
    """

    def __init__(
        self, model: Model, by_domain: bool, inference: InferenceConfig, batches: int, batch_size: int
    ) -> None:
        self.model, self.by_domain, self.inference = model, by_domain, inference
        self.batches, self.batch_size = batches, batch_size
        self.likelihood = DomainLikelihood(model, batch_size)

    def work(self, heldout: Mapping[str, HeldoutSequences]) -> int:
        """Number of steps that `row` takes."""
        return sum(self._count(texts) for texts in heldout.values())

    def row(self, heldout: Mapping[str, HeldoutSequences], advance: Callable[[int], None]) -> dict[str, dict]:
        """Domain -> {"loss", "how", "tokens", "auto", "accuracy"}; losses in nats per token.

        `auto` is the loss with the domain inferred, `accuracy` how often it was the right one after so many tokens
        (None where the model has no group of the domain, or no groups at all).
        """
        return {name: self._domain(name, texts, advance) for name, texts in heldout.items()}

    def _domain(self, name: str, texts: HeldoutSequences, advance: Callable[[int], None]) -> dict:
        names = self.model.groups.names
        own, read_by = names.index(name) if name in names else None, range(len(names))
        after, how = accuracy_after(texts.sequence_length), AUTO if own is None else OWN
        if not self.by_domain:
            read_by, own, after, how = [own or 0], 0, (), ANY
        top = min(self.inference.top, len(read_by))
        text = InferredDomainLoss(len(read_by), own, self.inference.prior, top, after)
        for sequence in self.likelihood.sequences(texts, self._count(texts), advance, read_by):
            text.add(sequence)
        result = text.result()
        return {
            "loss": result["auto"] if own is None else result["given"],
            "how": how,
            "tokens": result["tokens"],
            "auto": result["auto"] if self.by_domain else None,
            "accuracy": {str(n): share for n, share in result["accuracy"].items()},
        }

    def _count(self, texts: HeldoutSequences) -> int:
        return min(self.batches, -(-len(texts) // self.batch_size))
