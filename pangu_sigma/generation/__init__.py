"""Generation: requests, the engine with continuous batching, sampling, and decoding with a KV cache."""

from pangu_sigma.generation.request import (
    AUTO,
    Event,
    Request,
    Sampling,
    Score,
    document_begin,
    pick_domain,
    prompt_ids,
)

__all__ = ["AUTO", "Event", "Request", "Sampling", "Score", "document_begin", "pick_domain", "prompt_ids"]
