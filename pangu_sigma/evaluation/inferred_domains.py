"""Text whose domain nobody tells, measured: `evaluate --domain auto`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.errors import UserError
from pangu_sigma.generation.domain_inference import Prior, UnknownText, cached_prior
from pangu_sigma.model.model import Model
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.monitor.progress import progress
from pangu_sigma.trained_model import load_trained

AFTER = (32, 64, 128)  # tokens after which accuracy is told, besides the whole sequence
CACHED_SEQUENCES = 100


class DomainLikelihood:
    """Every token's log probability under each domain's experts, in batches of `batch_size` held-out sequences."""

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

        groups: numbers of the domains whose experts are asked, all of them if None.
        """
        for number in range(batches):
            tokens, mask = heldout.batch(number * self.batch_size, self.batch_size)
            found = self._batch(tokens, groups)
            advance(1)
            for row in range(self.batch_size):
                count = int(mask[row].sum())
                if count:
                    yield found[:, row, :count]

    def _batch(self, tokens: np.ndarray, groups: Sequence[int] | None = None) -> np.ndarray:
        """float64 [G, B, S]; tokens int32 [B, S + 1]."""
        asked = range(len(self.model.groups.names)) if groups is None else groups
        losses = [self.scorer.losses(tokens, np.full(self.batch_size, group, np.int32)) for group in asked]
        return -np.stack(losses).astype(np.float64)


def likeliest_domains(model: Model, texts: Sequence[Sequence[int]]) -> list[str]:
    """The domain under whose experts each text (token ids) is likeliest, of the last S + 1 tokens of a longer one; the
    first domain where a text of one token tells nothing.
    """
    scorer = Scorer(model, model.config.evaluate.batch_size)
    names = model.groups.names
    found = []
    for first in range(0, len(texts), scorer.rows):
        tokens = np.full((scorer.rows, scorer.length + 1), model.eod_id, np.int32)
        counted = np.zeros((scorer.rows, scorer.length), bool)
        batch = [list(text)[-scorer.length - 1 :] for text in texts[first : first + scorer.rows]]
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = ids
            counted[row, : len(ids) - 1] = True
        losses = [
            np.where(counted, scorer.losses(tokens, np.full(scorer.rows, number, np.int32)), 0.0).sum(axis=1)
            for number in range(len(names))
        ]
        found += [names[int(number)] for number in np.argmin(losses, axis=0)[: len(batch)]]
    return found


def accuracy_after(length: int) -> list[int]:
    """The numbers of tokens after which the inferred domain is compared with the right one; `length`: a sequence's."""
    return sorted({*(n for n in AFTER if n < length), length})


def evaluate_unknown(path: Path, *, batches: int | None = None, top: int = 1, prior: Prior = "uniform") -> dict:
    """Loss with the domain inferred beside the given one, and how often it is right, for every domain's held-out text.

    The prior `cached` comes from the first sequences of each domain's text, at most a hundred and at most half of them,
    which are not measured then. Returns {"step", "prior", "top", "domains": {name: see `UnknownText.result`}}.
    """
    trained = load_trained(path)
    model = trained.model
    names = model.groups.names
    if top > len(names):
        raise UserError(f"--top {top} is more than the {len(names)} domains there are: set it lower")
    length, size = model.config.data.sequence_length, model.config.evaluate.batch_size
    likelihood = DomainLikelihood(model, size)
    after = accuracy_after(length)
    results = {}
    with TemporaryDirectory(prefix="pangu-sigma-") as scratch:
        heldout = trained.corpus(Path(scratch)).heldout_to_measure()
        counts = {name: -(-len(texts) // size) for name, texts in heldout.items()}
        counts = {name: count if batches is None else min(count, batches) for name, count in counts.items()}
        with progress("evaluate", sum(counts.values()), unit="batches") as job:
            for number, name in enumerate(names):
                found = likelihood.sequences(heldout[name], counts[name], job.advance)
                cached = None
                if prior == "cached":
                    spare = min(CACHED_SEQUENCES, len(heldout[name]) // 2, counts[name] * size // 2)
                    if not spare:
                        raise UserError(
                            f"domain {name} has one held-out sequence, too few for --prior cached: take another prior"
                        )
                    cached = cached_prior([next(found) for _ in range(spare)])
                text = UnknownText(len(names), number, prior, top, after, cached)
                for sequence in found:
                    text.add(sequence)
                results[name] = text.result()
    return {"step": trained.checkpoint.step, "prior": prior, "top": top, "domains": results}


def unknown_table(result: dict) -> str:
    """The figures of `evaluate_unknown` as an aligned table."""
    from pangu_sigma.monitor.text_tables import number, text_table

    domains = result["domains"]
    after = list(next(iter(domains.values()))["accuracy"])
    rows = []
    for name, found in domains.items():
        shares = ["–" if found["accuracy"][n] is None else f"{100 * found['accuracy'][n]:.1f} %" for n in after]
        difference = number(found["auto"] - found["given"], sign=True)
        rows.append([name, number(found["given"]), number(found["auto"]), difference, *shares])
    return text_table(["domain", "given", "auto", "difference", *(f"right after {n}" for n in after)], rows)
