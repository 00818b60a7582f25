"""Corpus: all domains of a configuration, ready to read: tokenizer, token stores, packed sequences, unigram losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pangu_sigma.config.schema import Config
from pangu_sigma.data.domain_store import DomainStore, prepare_domain, unigram_loss
from pangu_sigma.data.packed_sequences import HeldoutSequences, PackedSequences
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_training import build_tokenizer
from pangu_sigma.errors import UserError

Progress = Callable[[str, str, int, int], None]
UNKNOWN_SHARE = 0.01  # from which a domain's unknown pieces are warned of


@dataclass(frozen=True)
class Corpus:
    """The tokenised domains of one configuration, in the configuration's order."""

    config: Config
    tokenizer: Tokenizer
    stores: tuple[DomainStore, ...]

    def messages(self) -> list[str]:
        """Sentences about the text for the user, before it is trained on: what was dropped and why, with examples."""
        return [line for s in self.stores for line in s.dropped.sentences(s.name, sum(s.documents.values()))]

    def warnings(self) -> list[str]:
        """Sentences about domains that lost most of their documents, or whose text the tokenizer cannot write."""
        sentences = [s.dropped.warning(s.name, sum(s.documents.values())) for s in self.stores]
        sentences += [
            f"domain '{s.name}': {s.unknown_share:.1%} of its tokens are unknown pieces, which stand for characters "
            "that the tokenizer cannot write: take one with byte fallback (data.tokenizer.kind train makes such)"
            for s in self.stores
            if s.unknown_share > UNKNOWN_SHARE
        ]
        return [sentence for sentence in sentences if sentence is not None]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Domain -> fingerprint of its text, which a checkpoint keeps."""
        return {s.name: s.corpus_fingerprint for s in self.stores}

    def training_streams(self) -> list[PackedSequences]:
        """Endless training sequences, one stream per domain."""
        length, seed = self.config.data.sequence_length, self.config.run.seed
        return [PackedSequences(s.name, s.train, length, seed, identity=s.identity) for s in self.stores]

    def heldout(self) -> dict[str, HeldoutSequences]:
        """Held-out sequences by domain; none where nothing is held out (data.heldout_fraction = 0)."""
        length = self.config.data.sequence_length
        eod, pad = self.tokenizer.eod_id, self.tokenizer.pad_id
        return {s.name: HeldoutSequences(s.heldout, length, eod, pad) for s in self.stores if s.heldout.tokens}

    def heldout_to_measure(self) -> dict[str, HeldoutSequences]:
        """`heldout()`, or UserError if there is none."""
        heldout = self.heldout()
        if not heldout:
            raise UserError(
                "data.heldout_fraction is 0, so no text was kept from training to measure with: train a run that holds "
                "some out"
            )
        return heldout

    def token_counts(self, size: int) -> dict[str, np.ndarray]:
        """How often every id of a vocabulary of `size` occurs in training text, by domain [size]; the tokenizer may use
        fewer ids."""
        return {s.name: np.pad(s.token_counts, (0, size - s.token_counts.size)) for s in self.stores}

    def unigram_losses(self, batches: int | None) -> dict[str, float]:
        """Loss (nats per token) of a model that knows only how frequent each token is, by domain, of the text that an
        evaluation of at most so many batches measures (None: all that is held out)."""
        heldout, size = self.heldout(), self.config.evaluate.batch_size
        losses = {}
        for store in self.stores:
            if store.name in heldout:
                vocabulary, sequences = len(store.token_counts), heldout[store.name]
                part = batches is not None and batches * size < len(sequences)
                counts = (
                    sequences.label_counts(vocabulary, batches * size) if part else store.heldout.counts(vocabulary)
                )
                losses[store.name] = unigram_loss(store.token_counts, counts)
        return losses

    def heldout_bytes(self, batches: int) -> dict[str, int]:
        """UTF-8 bytes, by domain, of the text that an evaluation of at most so many batches measures, as the tokenizer
        writes it; the end of a document is none."""
        sizes = {}
        for name, sequences in self.heldout().items():
            counts = sequences.label_counts(self.tokenizer.vocab_size, batches * self.config.evaluate.batch_size)
            used = np.flatnonzero(counts).tolist()
            sizes[name] = sum(int(counts[index]) * len(self.tokenizer.token_bytes(index)) for index in used)
        return sizes


def prepare_corpus(
    config: Config,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    known_corpora: Mapping[str, str] = MappingProxyType({}),
) -> Corpus:
    """Build or load the tokenizer (a given one wins) and tokenise every domain, or open what is cached.

    known_corpora: domain -> fingerprint of its text, by which what is cached is found where the text is gone.

    Raises UserError for anything wrong with the configured files.
    """
    settings = config.data.tokenizer
    if tokenizer is None:
        cache, size = Path(config.data.cache), settings.vocab_size
        tokenizer = build_tokenizer(settings.kind, config.domains, cache, settings.path, size, settings.eod)
    stores = tuple(
        prepare_domain(domain, tokenizer, config.data, progress, known_corpora.get(domain.name))
        for domain in config.domains
    )
    return Corpus(config, tokenizer, stores)
