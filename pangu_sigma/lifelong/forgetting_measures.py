"""What a sequence of stages kept, lost and gained, from the matrix of losses; pure arithmetic.

`losses[i][j]` is the held-out loss (nats per token) of domain j after stage i. All measures count in nats per token
with the sign turned, so that higher quality is higher: R[i, j] = -losses[i][j].

`learned[j]` is the stage (from 0) in which domain j was learned first. Where every stage brings one domain, learned[j]
= j and the definitions are those of the papers; where a stage brings several, or a domain returns, `learned` says which
entry of the matrix stands for "just learned". A domain that no stage brings (None) is measured, and counts nowhere.
NaN is what was not measured, which a domain may be as long as it is not learned.

Shapes: I stages, J domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
    """A mean over domains, and what it is the mean of: number of the domain -> nats per token; None over none."""

    mean: float | None
    by_domain: dict[int, float]


def _over_domains(learned: Sequence[int | None], stages: range, value: Callable[[int, int], float]) -> Measure:
    """The plain mean of value(domain, stage that learned it) over the domains that one of `stages` learned first."""
    pairs = ((j, learned_at) for j, learned_at in enumerate(learned) if learned_at in stages)
    by_domain = {j: float(value(j, learned_at)) for j, learned_at in pairs}
    return Measure(float(np.mean(list(by_domain.values()))) if by_domain else None, by_domain)


def backward_transfer(losses: np.ndarray, learned: Sequence[int | None]) -> Measure:
    """BWT = mean over the domains j learned before the last stage of R[I, j] - R[learned[j], j]; losses [I, J].

    Negative: later stages cost earlier domains. Source: Lopez-Paz and Ranzato, arXiv 1706.08840 (there for accuracies).
    """
    last = len(losses) - 1
    return _over_domains(learned, range(last), lambda j, learned_at: losses[learned_at, j] - losses[last, j])


def forgetting(losses: np.ndarray, learned: Sequence[int | None]) -> Measure:
    """Mean over the domains j learned before the last stage of (max over i < I of R[i, j]) - R[I, j]; losses [I, J].

    Positive: the domain was better once than it is at the end; negative: it is at its best now. Source: Chaudhry et
    al., arXiv 1801.10112 (there for accuracies).
    """
    last = len(losses) - 1
    return _over_domains(learned, range(last), lambda j, _: losses[last, j] - np.nanmin(losses[:last, j]))


def forward_transfer(losses: np.ndarray, untrained: np.ndarray, learned: Sequence[int | None]) -> Measure:
    """FWT = mean over the domains j learned after the first stage of R[learned[j] - 1, j] - b[j]; losses [I, J].

    untrained [J]: the losses -b of the model before any training, measured in the same way. Positive: what was learned
    before helps a domain that was never seen. Domains that were not measured before their stage count nowhere. Source:
    arXiv 1706.08840.
    """
    later = range(1, len(losses))
    before = [None if j is None else losses[j - 1, column] - untrained[column] for column, j in enumerate(learned)]
    measured = [None if gain is None or np.isnan(gain) else j for j, gain in zip(learned, before, strict=True)]
    return _over_domains(measured, later, lambda j, learned_at: untrained[j] - losses[learned_at - 1, j])


def learned_loss(losses: np.ndarray, learned: Sequence[int | None]) -> Measure:
    """Mean loss (nats per token, lower is better) of the domains right after the stage that brought them."""
    return _over_domains(learned, range(len(losses)), lambda j, learned_at: losses[learned_at, j])


def final_loss(losses: np.ndarray, learned: Sequence[int | None]) -> Measure:
    """Mean loss (nats per token, lower is better) after the last stage of the domains that were learned."""
    return _over_domains(learned, range(len(losses)), lambda j, _: losses[-1, j])
