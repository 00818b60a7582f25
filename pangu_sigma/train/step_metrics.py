"""What happened since the last line of metrics: losses, tokens, loads and drops, summed over steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pangu_sigma.model.batch_planner import RoutedBatch
from pangu_sigma.train.objective import Measured
from parallel.comm.processes import Processes
from rre.routers import ExpertGroups
from rre.store import StoreStats


@dataclass(frozen=True)
class Figures:
    """What one micro-batch gave, by domain d, sparse layer l and expert e, all float64 and exact where they count.

    Loss sums, units that they sum over, tokens and filled rows [d]; rows at experts [l, e], rows dropped [l, d];
    `told`: what else the objective tells, name -> [sum, count]; the auxiliary loss.
    """

    loss: np.ndarray
    units: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    load: np.ndarray
    dropped: np.ndarray
    told: dict[str, np.ndarray]
    auxiliary: float

    @classmethod
    def of(
        cls, batch: RoutedBatch, domains: int, measured: Measured, counts: Sequence[np.ndarray], auxiliary: float
    ) -> Figures:
        """Of what a micro-batch's objective measured, and rows [B, E + 1] of learned gates, one per sparse layer."""

        def by_domain(values: np.ndarray) -> np.ndarray:
            found = np.zeros(domains)
            np.add.at(found, batch.domain, values.astype(np.float64))
            return found

        load, dropped = batch.load.astype(np.float64), batch.dropped.astype(np.float64)
        for layer, plan in enumerate(batch.plans):
            if plan is None:
                load[layer] = counts[layer][:, :-1].sum(axis=0, dtype=np.float64)
                np.add.at(dropped[layer], batch.domain, counts[layer][:, -1].astype(np.float64))
        return cls(
            loss=by_domain(measured.losses),
            units=by_domain(measured.units),
            tokens=by_domain((batch.mask > 0).sum(axis=1)),
            rows=by_domain(batch.filled),
            load=load,
            dropped=dropped,
            told={name: np.array(value, np.float64) for name, value in sorted(measured.figures.items())},
            auxiliary=auxiliary,
        )

    def by_rank(self, processes: Processes) -> np.ndarray:
        """What every process's part of the micro-batch gave, one line each; all processes must ask together."""
        return processes.gather(np.concatenate([a.reshape(-1) for a in self._arrays()]))

    def summed(self, lines: np.ndarray) -> Figures:
        """The sum of some lines of `by_rank`; the auxiliary loss is the same everywhere."""
        line, found, at = lines.sum(axis=0), [], 0
        for mine in self._arrays():
            found.append(line[at : at + mine.size].reshape(mine.shape))
            at += mine.size
        told = dict(zip(self.told, found[6:], strict=True))
        return Figures(*found[:6], told, self.auxiliary)

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.loss, self.units, self.tokens, self.rows, self.load, self.dropped, *self.told.values()


class Accounting:
    """Sums over the steps between two metrics records; `take` gives the record's figures and starts anew."""

    def __init__(self, groups: ExpertGroups, layer_names: Sequence[str], flops_per_token: float) -> None:
        self.groups = groups
        self.layer_names = tuple(layer_names)
        self.flops_per_token = flops_per_token
        self._clear()

    def _clear(self) -> None:
        domains = len(self.groups.names)
        self.loss = np.zeros(domains)
        self.units = np.zeros(domains)
        self.tokens = np.zeros(domains, np.int64)
        self.rows = np.zeros(domains, np.int64)
        self.figures: dict[str, tuple[float, float]] = {}
        self.load = np.zeros((len(self.layer_names), self.groups.total), np.int64)
        self.dropped = np.zeros((len(self.layer_names), domains))
        self.auxiliary = 0.0
        self.batches = 0
        self.steps = 0
        self.activated = 0
        self.touched = 0
        self.started = time.monotonic()

    def add_batch(self, figures: Figures) -> None:
        """Add a micro-batch."""
        self.loss += figures.loss
        self.units += figures.units
        self.tokens += figures.tokens.astype(np.int64)
        self.rows += figures.rows.astype(self.rows.dtype)
        self.add_figures(figures)
        self.load += figures.load.astype(np.int64)
        self.dropped += figures.dropped
        self.activated += int((figures.load > 0).sum())
        self.auxiliary += figures.auxiliary
        self.batches += 1

    def add_figures(self, figures: Figures) -> None:
        """Add what the objective tells beside its losses."""
        for name, value in figures.told.items():
            self.add_figure(name, float(value[0]), float(value[1]))

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
        if self.layer_names:
            figures["expert_load"] = {
                layer_name: {name: self.load[layer][groups.of(name)].tolist() for name in names}
                for layer, layer_name in enumerate(self.layer_names)
            }
            figures["dropped_share"] = {
                layer_name: {names[i]: float(self.dropped[layer, i] / self.rows[i]) for i in seen}
                for layer, layer_name in enumerate(self.layer_names)
            }
            figures["experts"] = {
                "stored": self.groups.total * len(self.layer_names),
                "activated": self.activated / max(1, self.steps),
                "touched": self.touched / max(1, self.steps),
            }
            figures["auxiliary_loss"] = self.auxiliary / max(1, self.batches)
        self._clear()
        return figures


def store_figures(traffic: StoreStats, steps: int) -> dict[str, float]:
    """What the expert store did a step, by the names of the metrics log; the counters begin anew."""
    taken = traffic.take()
    fetched, hits = taken.pop("fetched"), taken.pop("hits")
    del taken["updated"]  # the record has it as touched experts
    return {name: value / max(1, steps) for name, value in taken.items()} | {
        "prefetch_hit_rate": hits / fetched if fetched else 1.0
    }
