"""Continue texts: requests, the engine that serves many at once, and the model's two ways to give it logits."""

from pangu_sigma.generation.request import AUTO, Event, Request, Sampling, Score, pick_domain, prompt_ids

__all__ = ["AUTO", "Event", "Request", "Sampling", "Score", "pick_domain", "prompt_ids"]
