"""Step metrics: losses, tokens, expert loads and drops of micro-batches, summed over processes and over steps."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.training.gradients import trained_experts
from pangu_sigma.training.objective import BatchLoss
from parallel.comm.processes import Processes
from rre.routers import ExpertGroups
from rre.store import StoreStats


@dataclass(frozen=True)
class BatchMetrics:
    """Metrics of a micro-batch, or the sums of several, by domain d, sparse layer l and expert e, all float64 and exact
    where they count.

    loss, units: loss sums and the units that they sum over [d]. tokens: whose label counts [d]. rows: filled ones [d].
    load: rows at experts [l, e]. dropped: rows dropped [l, d]. extra_metrics: what else the objective reports,
    name -> [sum, count]. auxiliary: the auxiliary loss, the same in every process.
    """

    loss: np.ndarray
    units: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    load: np.ndarray
    dropped: np.ndarray
    extra_metrics: dict[str, np.ndarray]
    auxiliary: float

    @classmethod
    def from_loss(
        cls, batch: RoutedBatch, domains: int, loss: BatchLoss, gate_rows: Sequence[np.ndarray], auxiliary: float
    ) -> BatchMetrics:
        """Metrics of the rows that this process computed.

        domains: their count. gate_rows: of every sparse layer with a learned gate, the rows of each sample that each
        expert got, and those dropped [B, E + 1]; for layers whose routing the batch's plan has, nothing is looked up.
        """

        def by_domain(values: np.ndarray) -> np.ndarray:
            sums = np.zeros(domains)
            np.add.at(sums, batch.domain, values.astype(np.float64))
            return sums

        load, dropped = batch.load.astype(np.float64), batch.dropped.astype(np.float64)
        for layer, plan in enumerate(batch.plans):
            if plan is None:
                load[layer] = gate_rows[layer][:, :-1].sum(axis=0, dtype=np.float64)
                np.add.at(dropped[layer], batch.domain, gate_rows[layer][:, -1].astype(np.float64))
        return cls(
            loss=by_domain(loss.losses),
            units=by_domain(loss.units),
            tokens=by_domain((batch.mask > 0).sum(axis=1)),
            rows=by_domain(batch.filled),
            load=load,
            dropped=dropped,
            extra_metrics={name: np.array(value, np.float64) for name, value in sorted(loss.extra_metrics.items())},
            auxiliary=auxiliary,
        )

    @classmethod
    def zeros(cls, domains: int, layers: int, experts: int) -> BatchMetrics:
        """Metrics of no batch."""
        by_domain, load, dropped = np.zeros(domains), np.zeros((layers, experts)), np.zeros((layers, domains))
        return cls(by_domain, by_domain, by_domain, by_domain, load, dropped, {}, 0.0)

    def __add__(self, other: BatchMetrics) -> BatchMetrics:
        """The metrics of both together."""
        sums = (mine + others for mine, others in zip(self._arrays()[:6], other._arrays()[:6], strict=True))
        both = BatchMetrics(*sums, self.extra_metrics, self.auxiliary + other.auxiliary)
        return both.with_extra_metrics(other.extra_metrics)

    def with_extra_metrics(self, extra_metrics: Mapping[str, np.ndarray]) -> BatchMetrics:
        """The same with more of some extra metrics."""
        both = {name: self.extra_metrics.get(name, 0.0) + value for name, value in extra_metrics.items()}
        return replace(self, extra_metrics=self.extra_metrics | both)

    def gather(self, processes: Processes) -> np.ndarray:
        """Every process's metrics of its part of the micro-batch, a flat line each; all processes call it together."""
        return processes.gather(np.concatenate([array.reshape(-1) for array in self._arrays()]))

    def sum_ranks(self, lines: np.ndarray) -> BatchMetrics:
        """The sum of some lines of `gather`; the auxiliary loss is the same everywhere."""
        line, sums, offset = lines.sum(axis=0), [], 0
        for array in self._arrays():
            sums.append(line[offset : offset + array.size].reshape(array.shape))
            offset += array.size
        extra_metrics = dict(zip(self.extra_metrics, sums[6:], strict=True))
        return BatchMetrics(*sums[:6], extra_metrics, self.auxiliary)

    def _arrays(self) -> tuple[np.ndarray, ...]:
        """All that is summed, in the order of a line of `gather`."""
        return (
            self.loss, self.units, self.tokens, self.rows, self.load, self.dropped, *self.extra_metrics.values()
        )  # fmt: skip


def updated_experts(metrics: Sequence[BatchMetrics], groups: ExpertGroups, trained: Collection[str]) -> np.ndarray:
    """Whether an expert received a row of a step's micro-batches and is of a `trained` domain, bool [layers, E]."""
    return (sum(of_batch.load for of_batch in metrics) > 0) & trained_experts(groups, trained)


def updated_domains(metrics: Sequence[BatchMetrics], groups: ExpertGroups, trained: Collection[str]) -> list[int]:
    """Ids of the `trained` domains with text in a step's micro-batches."""
    tokens = sum(of_batch.tokens for of_batch in metrics)
    return [domain_id for domain_id in np.flatnonzero(tokens).tolist() if groups.names[domain_id] in trained]


class MetricsAccumulator:
    """Sums of metrics over the steps between two records; `take_record` gives them and sets everything to zero.

    layer_names: of the sparse layers. flops_per_token: training FLOPs of one token.
    """

    def __init__(self, groups: ExpertGroups, layer_names: Sequence[str], flops_per_token: float) -> None:
        self.groups = groups
        self.layer_names = tuple(layer_names)
        self.flops_per_token = flops_per_token
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self.sums = BatchMetrics.zeros(len(self.groups.names), len(self.layer_names), self.groups.total)
        self.batches = 0
        self.steps = 0
        self.activated = 0
        self.touched = 0
        self.started = time.monotonic()

    def add_batch(self, metrics: BatchMetrics) -> None:
        """Add a micro-batch."""
        self.sums += metrics
        self.activated += int((metrics.load > 0).sum())
        self.batches += 1

    def add_extra_metrics(self, extra_metrics: Mapping[str, np.ndarray]) -> None:
        """Add metrics, name -> [sum, count], whose records are their sums by their counts."""
        self.sums = self.sums.with_extra_metrics(extra_metrics)

    def add_step(self, touched: int) -> None:
        """Count one finished optimizer step, which updated `touched` experts (embedding slots included)."""
        self.steps += 1
        self.touched += touched

    @property
    def mean_loss(self) -> float:
        """Mean loss so far, in nats per token (or per pair: whatever the objective counts)."""
        return float(self.sums.loss.sum() / max(1.0, self.sums.units.sum()))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of text (a token whose label does not count included) per second since the last record."""
        return float(self.sums.rows.sum() / max(1e-9, time.monotonic() - self.started))

    def take_record(self) -> dict[str, object]:
        """The metrics since the last record, by their names in the metrics log; then everything is zero again."""
        sums, names, groups = self.sums, self.groups.names, self.groups
        seen = np.flatnonzero(sums.units).tolist()
        speed = self.tokens_per_second
        record: dict[str, object] = {
            "loss": self.mean_loss,
            "losses": {names[i]: float(sums.loss[i] / sums.units[i]) for i in seen},
            "tokens": {names[i]: int(sums.tokens[i]) for i in seen},
            "tokens_per_second": speed,
            "flops_per_second": speed * self.flops_per_token,
            "seconds": time.monotonic() - self.started,
            "figures": {name: float(value / max(1.0, count)) for name, (value, count) in sums.extra_metrics.items()},
        }
        if self.layer_names:
            load = sums.load.astype(np.int64)
            record["expert_load"] = {
                layer_name: {name: load[layer][groups.of(name)].tolist() for name in names}
                for layer, layer_name in enumerate(self.layer_names)
            }
            record["dropped_share"] = {
                layer_name: {names[i]: float(sums.dropped[layer, i] / sums.rows[i]) for i in seen}
                for layer, layer_name in enumerate(self.layer_names)
            }
            record["experts"] = {
                "stored": self.groups.total * len(self.layer_names),
                "activated": self.activated / max(1, self.steps),
                "touched": self.touched / max(1, self.steps),
            }
            record["auxiliary_loss"] = sums.auxiliary / max(1, self.batches)
        self.clear()
        return record


def take_store_metrics(traffic: StoreStats, steps: int) -> dict[str, float]:
    """What the expert store did per step, by the names of the metrics log; its counters are set to zero."""
    counters = traffic.take()
    fetched, hits = counters.pop("fetched"), counters.pop("hits")
    del counters["updated"]  # the record has it as touched experts
    return {name: value / max(1, steps) for name, value in counters.items()} | {
        "prefetch_hit_rate": hits / fetched if fetched else 1.0
    }
