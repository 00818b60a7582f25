"""The domain of a model that a new domain's text is likeliest to belong to, whose experts it may begin with (DEMix,
Gururangan et al., arXiv 2108.05036)."""

from __future__ import annotations

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.data.domain_store import DomainStore
from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.monitor.progress import progress
from pangu_sigma.trained_model import trained_from

SEQUENCES = 100


def nearest_domain(source: Checkpoint, store: DomainStore) -> str:
    """The domain with the highest mean posterior after each of the first sequences (a hundred, or all of fewer) of the
    new domain's training text, all domains being as likely before."""
    from pangu_sigma.evaluation.inferred_domains import DomainLikelihood
    from pangu_sigma.generation.domain_inference import cached_prior

    trained = trained_from(source)
    model, eod, pad = trained.model, trained.tokenizer.eod_id, trained.tokenizer.pad_id
    size = model.config.evaluate.batch_size
    texts = HeldoutSequences(store.train, model.config.data.sequence_length, eod, pad)
    batches = -(-min(SEQUENCES, len(texts)) // size)
    try:
        with progress(f"compare {store.name} with the domains there are", batches, unit="batches") as job:
            posterior = cached_prior(list(DomainLikelihood(model, size).sequences(texts, batches, job.advance)))
    finally:
        model.store.close()
    return source.domains[int(posterior.argmax())]
