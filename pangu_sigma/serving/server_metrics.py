"""Server metrics for Prometheus. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """Counters of requests and tokens per domain, gauges of slots and queue, histograms of times.

    The `SchedulerObserver` of the server's scheduler; used on the event loop.
    """

    def __init__(self, domains: Sequence[str], slots: int) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        name = "pangu_sigma_"
        self.requests = Counter(
            name + "requests", "HTTP requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter(name + "prompt_tokens", "Prompt tokens.", ["domain"], registry=self.registry)
        self.written_tokens = Counter(
            name + "generated_tokens", "Tokens written for clients.", ["domain"], registry=self.registry
        )
        self.broken = Counter(
            name + "failed", "Texts whose logits were not finite.", ["domain"], registry=self.registry
        )
        self.left = Counter(
            name + "disconnects", "Requests whose client left before the answer was whole.", registry=self.registry
        )
        self.active = Gauge(name + "active_requests", "Texts that hold a slot.", registry=self.registry)
        self.waiting = Gauge(name + "waiting_requests", "Texts that wait for a slot.", registry=self.registry)
        Gauge(name + "slots", "Texts that can be decoded together.", registry=self.registry).set(slots)
        self.request_seconds = Histogram(
            name + "request_seconds", "From request to whole answer.", buckets=_SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            name + "first_token_seconds", "From request to first token.", buckets=_SECONDS, registry=self.registry
        )
        self.step_seconds = Histogram(
            name + "step_seconds", "One decoding step.", buckets=_STEP_SECONDS, registry=self.registry
        )
        self.step_tokens = Histogram(
            name + "step_tokens", "Tokens that one decoding step wrote.", buckets=_BATCH, registry=self.registry
        )
        for domain in domains:  # a series that is 0 is better than one that is missing
            self.prompt_tokens.labels(domain)
            self.written_tokens.labels(domain)
            self.broken.labels(domain)

    def state(self, active: int, waiting: int) -> None:
        """Set how many texts hold a slot and how many wait, by the engine's own count."""
        self.active.set(active)
        self.waiting.set(waiting)

    def stepped(self, seconds: float, tokens: int) -> None:
        """Count a decoding step that took `seconds` and wrote `tokens`."""
        self.step_seconds.observe(seconds)
        self.step_tokens.observe(tokens)

    def answered(self, seconds: float) -> None:
        """Count a finished text, `seconds` after it was submitted."""
        self.request_seconds.observe(seconds)

    def failed(self, domain: str) -> None:
        """Count a text that the model could not continue."""
        self.broken.labels(domain).inc()

    def exposition(self) -> tuple[bytes, str]:
        """Prometheus' text format and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
