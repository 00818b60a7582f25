"""Result of an evaluation per domain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class DomainEvaluation:
    """Held-out quality of a model.

    step: of the checkpoint. losses, unigram: mean loss of every domain's text under its own experts and that of a
    unigram model, in nats per token. perplexity: exp(loss). matrix: text's domain -> domain of the experts -> loss.
    tokens: held-out tokens that were measured, by domain, the unigram model's loss too. batches: of each domain, how
    many were measured and how many there are.
    """

    step: int
    losses: dict[str, float]
    perplexity: dict[str, float]
    unigram: dict[str, float]
    matrix: dict[str, dict[str, float]]
    tokens: dict[str, int]
    batches: dict[str, list[int]]

    def __repr__(self) -> str:
        losses = {name: round(loss, 3) for name, loss in self.losses.items()}
        return f"DomainEvaluation(step={self.step}, losses={losses})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
