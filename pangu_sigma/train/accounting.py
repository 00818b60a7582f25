"""What happened since the last line of metrics: losses, tokens, loads and drops, summed over steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pangu_sigma.model.inputs import PlannedBatch
from pangu_sigma.train.objective import Measured
from rre.routers import Groups
from rre.store import Traffic


class Accounting:
    """Sums over the steps between two metrics records; `take` gives the record's figures and starts anew."""

    def __init__(self, groups: Groups, places: Sequence[str], flops_per_token: float) -> None:
        self.groups = groups
        self.places = tuple(places)
        self.flops_per_token = flops_per_token
        self._clear()

    def _clear(self) -> None:
        domains = len(self.groups.names)
        self.loss = np.zeros(domains)
        self.units = np.zeros(domains)
        self.tokens = np.zeros(domains, np.int64)
        self.rows = np.zeros(domains, np.int64)
        self.figures: dict[str, tuple[float, float]] = {}
        self.load = np.zeros((len(self.places), self.groups.total), np.int64)
        self.dropped = np.zeros((len(self.places), domains))
        self.auxiliary = 0.0
        self.batches = 0
        self.steps = 0
        self.activated = 0
        self.touched = 0
        self.started = time.monotonic()

    def add_batch(self, batch: PlannedBatch, measured: Measured, counts: Sequence[np.ndarray], aux: float) -> None:
        """Add a micro-batch: what its objective measured, and rows [B, E + 1] of learned gates, one per sparse
        layer.
        """
        np.add.at(self.loss, batch.domain, measured.losses.astype(np.float64))
        np.add.at(self.units, batch.domain, measured.units)
        np.add.at(self.tokens, batch.domain, (batch.mask > 0).sum(axis=1))
        np.add.at(self.rows, batch.domain, batch.filled)
        self.add_figures(measured)
        for layer, plan in enumerate(batch.plans):
            if plan is None:
                kept, lost = counts[layer][:, :-1].astype(np.int64), counts[layer][:, -1].astype(np.float64)
                self.load[layer] += kept.sum(axis=0)
                self.activated += int((kept.sum(axis=0) > 0).sum())
                np.add.at(self.dropped[layer], batch.domain, lost)
            else:
                np.add.at(self.load[layer], plan.experts, plan.counts)
                self.activated += int((plan.counts > 0).sum())
        self.dropped += batch.dropped
        self.auxiliary += aux
        self.batches += 1

    def add_figures(self, measured: Measured) -> None:
        """Add what the objective tells beside its losses."""
        for name, (value, count) in measured.figures.items():
            self.add_figure(name, value, count)

    def add_figure(self, name: str, value: float, count: float) -> None:
        """Add to a figure whose record is the sum of values by the sum of counts."""
        before = self.figures.get(name, (0.0, 0.0))
        self.figures[name] = (before[0] + value, before[1] + count)

    def add_step(self, touched: int) -> None:
        """Count one finished optimizer step, which updated `touched` experts (embedding slots included)."""
        self.steps += 1
        self.touched += touched

    @property
    def mean_loss(self) -> float:
        """Mean loss so far, in nats per token (or per pair: whatever the objective counts)."""
        return float(self.loss.sum() / max(1.0, self.units.sum()))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of text (a token whose label does not count included) per second since the last record."""
        return float(self.rows.sum() / max(1e-9, time.monotonic() - self.started))

    def take(self) -> dict[str, object]:
        """The record's figures, by the names of the metrics log; then everything is zero again."""
        names, groups = self.groups.names, self.groups
        seen = [i for i, units in enumerate(self.units) if units]
        speed = self.tokens_per_second
        figures: dict[str, object] = {
            "loss": self.mean_loss,
            "losses": {names[i]: float(self.loss[i] / self.units[i]) for i in seen},
            "tokens": {names[i]: int(self.tokens[i]) for i in seen},
            "tokens_per_second": speed,
            "flops_per_second": speed * self.flops_per_token,
            "seconds": time.monotonic() - self.started,
            "figures": {name: value / max(1.0, count) for name, (value, count) in self.figures.items()},
        }
        if self.places:
            figures["expert_load"] = {
                place: {name: self.load[layer][groups.of(name)].tolist() for name in names}
                for layer, place in enumerate(self.places)
            }
            figures["dropped_share"] = {
                place: {names[i]: float(self.dropped[layer, i] / self.rows[i]) for i in seen}
                for layer, place in enumerate(self.places)
            }
            figures["experts"] = {
                "stored": self.groups.total * len(self.places),
                "activated": self.activated / max(1, self.steps),
                "touched": self.touched / max(1, self.steps),
            }
            figures["auxiliary_loss"] = self.auxiliary / max(1, self.batches)
        self._clear()
        return figures


def store_figures(traffic: Traffic, steps: int) -> dict[str, float]:
    """What the expert store did a step, by the names of the metrics log; the counters begin anew."""
    taken = traffic.take()
    fetched, hits = taken.pop("fetched"), taken.pop("hits")
    del taken["updated"]  # the record has it as touched experts
    return {name: value / max(1, steps) for name, value in taken.items()} | {
        "prefetch_hit_rate": hits / fetched if fetched else 1.0
    }
