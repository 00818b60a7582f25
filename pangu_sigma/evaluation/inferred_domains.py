"""Evaluation with the domain inferred from the text: `evaluate --domain auto`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.errors import UserError, argument
from pangu_sigma.generation.domain_inference import (
    Prior,
    auto_log_probabilities,
    cached_prior,
    next_prior,
    posteriors,
)
from pangu_sigma.model.model import Model
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.monitor.progress import progress
from pangu_sigma.trained_model import load_trained

ACCURACY_TOKENS = (8, 16, 32, 64, 128)  # token counts after which accuracy is measured, besides the whole sequence
CACHED_SEQUENCES = 100


class InferredDomainLoss:
    """Loss of texts of one domain (index `own` of G) with the domain inferred and given, one sequence after another.

    `own` None: the model has no experts of this domain, so there is no given domain and no right one. `after`:
    token counts after which the best domain is compared with the right one. Sequences come in the order of the
    text, which matters for the updated prior. loss: nats per token.
    """

    def __init__(
        self,
        domains: int,
        own: int | None,
        kind: Prior,
        top: int,
        after: Sequence[int],
        cached: np.ndarray | None = None,
    ) -> None:
        if kind == "cached" and cached is None:
            raise ValueError("a cached prior needs its sequences")
        self.own, self.kind, self.top = own, kind, top
        self.prior = cached if kind == "cached" else np.full(domains, 1.0 / domains)
        self.right = dict.fromkeys(after, 0)
        self.seen = dict.fromkeys(after, 0)
        self.tokens = 0
        self._auto = 0.0
        self._given = 0.0

    def add(self, log_likelihood: np.ndarray) -> None:
        """One sequence: log_likelihood [G, n] of its n tokens, padding left out."""
        posterior = posteriors(log_likelihood, self.prior)
        for after in self.right:
            if after <= log_likelihood.shape[1]:
                self.seen[after] += 1
                self.right[after] += int(np.argmax(posterior[:, after]) == self.own)
        self._auto -= float(auto_log_probabilities(log_likelihood, posterior, self.top).sum())
        if self.own is not None:
            self._given -= float(log_likelihood[self.own].sum())
        self.tokens += log_likelihood.shape[1]
        if self.kind == "updating":
            self.prior = next_prior(self.prior, posterior[:, -1])

    def result(self) -> dict:
        """loss with the domain inferred and given, accuracy by number of tokens (None: no sequence so long).

        Without a domain of its own `given` and every accuracy are None.
        """
        known = self.own is not None
        return {
            "auto": self._auto / self.tokens if self.tokens else math.nan,
            "given": None if not known else self._given / self.tokens if self.tokens else math.nan,
            "accuracy": {
                after: self.right[after] / self.seen[after] if known and self.seen[after] else None
                for after in self.right
            },
            "tokens": self.tokens,
        }


class DomainLikelihood:
    """Log likelihood of every token under each domain's experts, in batches of `batch_size` held-out sequences."""

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.scorer = Scorer(model, batch_size)

    def sequences(
        self,
        heldout: HeldoutSequences,
        batches: int,
        advance: Callable[[int], None],
        groups: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """float64 [G, n] of every sequence in order, n being its tokens without padding; `advance(1)` per batch.

        groups: indices of the domains whose experts compute, all of them if None.
        """
        groups = range(len(self.model.groups.names)) if groups is None else groups
        for batch in range(batches):
            tokens, mask = heldout.batch(batch * self.batch_size, self.batch_size)
            losses = [self.scorer.losses(tokens, np.full(self.batch_size, group, np.int32)) for group in groups]
            log_likelihood = -np.stack(losses).astype(np.float64)
            advance(1)
            for row in range(self.batch_size):
                count = int(mask[row].sum())
                if count:
                    yield log_likelihood[:, row, :count]


def likeliest_domains(model: Model, texts: Sequence[Sequence[int]]) -> list[str]:
    """The domain under whose experts each text (token ids) is likeliest, of the last S + 1 tokens of a longer one; the
    first domain for a text of one token.
    """
    scorer = Scorer(model, model.config.evaluate.batch_size)
    names = model.groups.names
    likeliest = []
    for first in range(0, len(texts), scorer.rows):
        tokens = np.full((scorer.rows, scorer.length + 1), model.eod_id, np.int32)
        counted = np.zeros((scorer.rows, scorer.length), bool)
        batch = [list(text)[-scorer.length - 1 :] for text in texts[first : first + scorer.rows]]
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = ids
            counted[row, : len(ids) - 1] = True
        losses = [
            np.where(counted, scorer.losses(tokens, np.full(scorer.rows, domain, np.int32)), 0.0).sum(axis=1)
            for domain in range(len(names))
        ]
        likeliest += [names[int(domain)] for domain in np.argmin(losses, axis=0)[: len(batch)]]
    return likeliest


def accuracy_after(length: int) -> list[int]:
    """Token counts after which the inferred domain is compared with the right one; `length`: a sequence's."""
    return sorted({*(n for n in ACCURACY_TOKENS if n < length), length})


def evaluate_inferred_domains(
    path: Path, *, batches: int | None = None, top: int = 1, prior: Prior = "uniform"
) -> dict:
    """Loss with the domain inferred and given, and how often the inferred one is right, for every domain's held-out
    text.

    The prior `cached` comes from the first sequences of each domain's text, at most a hundred and at most half of them,
    which are not measured then. `batches` of each text, as `EvaluateConfig.batch_limit` takes them. Returns
    {"step", "prior", "top", "domains": {name: see `InferredDomainLoss.result`}}.
    """
    trained = load_trained(path)
    model = trained.model
    names = model.groups.names
    if top > len(names):
        raise UserError(f"{argument('top', top)} is more than the {len(names)} domains there are: set it lower")
    length, size = model.config.data.sequence_length, model.config.evaluate.batch_size
    likelihood = DomainLikelihood(model, size)
    after = accuracy_after(length)
    results = {}
    with TemporaryDirectory(prefix="pangu-sigma-") as scratch:
        heldout = trained.corpus(Path(scratch)).heldout_to_measure()
        counts = {name: -(-len(texts) // size) for name, texts in heldout.items()}
        limit = model.config.evaluate.batch_limit(batches)
        counts = {name: count if limit is None else min(count, limit) for name, count in counts.items()}
        with progress("evaluate", sum(counts.values()), unit="batches") as job:
            for domain, name in enumerate(names):
                sequences = likelihood.sequences(heldout[name], counts[name], job.advance)
                cached = None
                if prior == "cached":
                    spare = min(CACHED_SEQUENCES, len(heldout[name]) // 2, counts[name] * size // 2)
                    if not spare:
                        raise UserError(
                            f"domain {name} has one held-out sequence, too few for {argument('prior', prior)}: take "
                            "another"
                        )
                    cached = cached_prior([next(sequences) for _ in range(spare)])
                text = InferredDomainLoss(len(names), domain, prior, top, after, cached)
                for sequence in sequences:
                    text.add(sequence)
                results[name] = text.result()
    return {"step": trained.checkpoint.step, "prior": prior, "top": top, "domains": results}


def inferred_domains_table(result: dict) -> str:
    """The figures of `evaluate_inferred_domains` as an aligned table."""
    from pangu_sigma.monitor.text_tables import number, text_table

    domains = result["domains"]
    after = list(next(iter(domains.values()))["accuracy"])
    rows = []
    for name, figures in domains.items():
        shares = ["–" if figures["accuracy"][n] is None else f"{100 * figures['accuracy'][n]:.1f} %" for n in after]
        gain = number(figures["given"] - figures["auto"], sign=True)
        rows.append([name, number(figures["given"]), number(figures["auto"]), gain, *shares])
    return text_table(["domain", "given", "auto", "gain", *(f"right after {n}" for n in after)], rows)
