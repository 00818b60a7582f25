"""Prompt reader: what the model says about a prompt, read block after block, one block a turn.

Of a prompt only the text after its last end-of-document token is continued; scores look at all of its documents, and
the inference of its domain at the last two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from pangu_sigma.generation.decoder import Decoder, Turns
from pangu_sigma.generation.domain_inference import posteriors, token_log_probabilities
from pangu_sigma.generation.domain_mixture import DomainInference
from pangu_sigma.generation.request import Score
from pangu_sigma.generation.sampling import likeliest, log_softmax

Document = tuple[int, ...]


class NotFiniteError(Exception):
    """Logits of a text are not finite."""


class PromptReader:
    """Reader of prompts with one decoder. `silent`: ids that no text has, never listed among alternatives."""

    def __init__(self, decoder: Decoder, eod_id: int, silent: np.ndarray) -> None:
        self.decoder = decoder
        self.eod_id = eod_id
        self.silent = silent

    def documents(self, ids: Sequence[int]) -> list[Document]:
        """`ids` cut behind every end-of-document token but a last one."""
        ends = [index + 1 for index, token in enumerate(ids[:-1]) if token == self.eod_id]
        return [tuple(ids[a:b]) for a, b in pairwise([0, *ends, len(ids)])]

    def scores(
        self, documents: Sequence[Document], blocks: Iterator[np.ndarray | None], alternatives: int
    ) -> Turns[tuple[tuple[Score, ...], np.ndarray]]:
        """Scores of every token of the documents, and the row [V] after the last.

        `blocks`: logits or log probabilities [n, V] after each token, a part after the other, None where a turn ends
        without one. Raises NotFiniteError.
        """
        ids = [token for document in documents for token in document]
        scores, last = [Score(ids[0], None)], np.zeros(0)
        for rows in blocks:
            if rows is not None:
                _check_finite(rows)
                for row, token in zip(rows, ids[len(scores) :], strict=False):
                    logprobs = log_softmax(row)
                    listed = likeliest(self.without_silent(logprobs), alternatives)
                    scores.append(Score(token, float(logprobs[token]), listed))
                last = rows[-1].copy()
            yield
        return tuple(scores), last

    def logits(self, documents: Sequence[Document], domain: int) -> Iterator[np.ndarray]:
        """Logits [n, V] after each token of one block after the other."""
        for document in documents:
            yield from self.decoder.score_blocks(document, domain)

    def mixed(self, documents: Sequence[Document], inference: DomainInference) -> Iterator[np.ndarray | None]:
        """Log probabilities [n, V] of the mixture of domains after each token of one block after the other, the prior
        being that of the beginning; None after a block's other turns, one for each domain."""
        ids = np.array([token for document in documents for token in document], np.int64)
        prior = inference.prior
        log_likelihood = np.zeros((len(inference.candidates), 0))
        by_domain = [self.logits(documents, domain) for domain in inference.candidates]
        start = 0
        while start < ids.size:
            parts = []
            for blocks in by_domain:
                if parts:
                    yield None
                parts.append(log_softmax(next(blocks)))
            rows = np.stack(parts)
            after = start + rows.shape[1]
            following = ids[start + 1 : after + 1]
            own = np.take_along_axis(rows[:, : following.size], following[None, :, None], axis=2)[..., 0]
            log_likelihood = np.concatenate([log_likelihood, own], axis=1)
            posterior = posteriors(log_likelihood[:, : after - 1], prior)
            yield inference.rows(rows, posterior[:, start:after])
            start = after

    def evidence(
        self, documents: Sequence[Document], inference: DomainInference
    ) -> Turns[tuple[np.ndarray, np.ndarray]]:
        """Log-likelihood [G, n - 1] of a prompt's last document and the one before it, whose end predicts its first
        token, without their first token, under each candidate's experts; and whether that one's numbers are finite [G].

        Raises NotFiniteError where no domain's are.
        """
        looked_at = [ids for ids in documents[-2:-1] if len(ids) <= self.decoder.window] + list(documents[-1:])
        ids = np.array([token for document in looked_at for token in document], np.int64)
        log_likelihoods, able = np.zeros((len(inference.candidates), ids.size - 1)), []
        for own, domain in zip(log_likelihoods, inference.candidates, strict=True):
            start, finite = 0, True
            for rows in self.logits(looked_at, domain):
                following = ids[start + 1 : start + len(rows) + 1]
                finite = finite and bool(np.isfinite(rows).all())
                if finite:
                    own[start : start + following.size] = token_log_probabilities(rows[: following.size], following)
                start += len(rows)
                yield
            # A domain whose numbers are not finite writes nothing, so no text is its own.
            if not finite:
                own[:] = 0.0
            able.append(finite)
        if not any(able):
            raise NotFiniteError
        return log_likelihoods, np.array(able)

    def without_silent(self, row: np.ndarray) -> np.ndarray:
        """The row [V] with minus infinity at the ids that no text has."""
        if not self.silent.size:
            return row
        row = row.copy()
        row[self.silent] = -np.inf
        return row


def _check_finite(rows: np.ndarray) -> None:
    if not np.isfinite(rows).all():
        raise NotFiniteError
