"""Held-out loss on a mesh, by an SPMD graph: no row is dropped, and placement groups measure side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.forward_pass import ForwardPass, WeightedLoss
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.training.distributed.mesh_runtime import mesh_runtime_of
from rre.dispatch.capacity_dispatch import CapacityExceeded

OnProgress = Callable[[int], None]

# Rows of a slot by those of even routing: for more, the graph with room for every row measures the batch.
USUAL_ROWS_FACTOR = 2.0


class LossByGroup(nn.Cell):
    """A graph's inputs -> for each placement group the loss sum of the rows that it reads, float32 [].

    As scalars, because MindSpore shards every other output of an evaluation over all devices, however the rows were.
    """

    def __init__(self, model: Model, inputs: GraphInputs) -> None:
        super().__init__(auto_prefix=False)
        layout, groups = model.layout, model.processes.mesh.placement_groups
        self.loss = ForwardPass(model.net, inputs, WeightedLoss(model.net.head, layout))
        reads = np.repeat(np.eye(groups, dtype=np.float32), inputs.batch // groups, axis=1)
        self.reads = [Tensor(of_group) for of_group in reads]
        self.mul = layout(ops.Mul(), ("rows",), ("rows",))
        self.sum = layout(ops.ReduceSum(), ("rows",))
        self.set_train(False)
        self.set_inputs(*inputs.placeholders(layout))

    def construct(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        _, by_sample, _, _ = self.loss(*inputs)
        sums = ()
        for of_group in self.reads:
            sums = sums + (self.sum(self.mul(by_sample, of_group)),)
        return sums


class EvaluationGraph:
    """An evaluation graph whose slots take so many `rows` of a shard: a planned batch -> loss sums by group [G]."""

    def __init__(self, model: Model, batch: int, rows: int) -> None:
        self.model, self.inputs = model, model.mesh_evaluation_inputs(batch, rows)
        self.planner = BatchPlanner(model, self.inputs, training=False)
        self.cell = LossByGroup(model, self.inputs)
        self.graph = mesh_runtime_of(model).evaluation(self.inputs, self.cell)

    def __call__(self, planned: RoutedBatch) -> np.ndarray:
        inputs = self.inputs.pack(planned, self.model.store)
        # The network is shared with the training step, so its mode is set per use.
        self.graph.set_train(False)
        return np.array([float(of_group.asnumpy()) for of_group in self.graph(*inputs)])


class MeshEvaluator:
    """Measures held-out sequences on all ranks of a mesh, `batch_size` at a time; see `evaluation.domain_evaluation`.

    A placement group holds its own domains' experts alone, so it measures their texts, one after the other, while the
    other groups measure theirs.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.figures: dict[str, float] = {}
        self.mesh = model.processes.mesh
        self.domains = self.mesh.domains_of_groups(model.groups.sizes)
        self.batch_per_group = batch_size // self.mesh.placement_groups
        # The most rows that a slot can get, and the most that it usually gets.
        most = batch_size // self.mesh.rows * model.config.data.sequence_length
        even = most * model.config.experts_per_token / max(1, min(model.groups.sizes, default=1))
        usual = math.ceil(USUAL_ROWS_FACTOR * even)
        self._rows = [most] if model.learned or usual >= most else [usual, most]
        self._graphs: dict[int, EvaluationGraph] = {}

    def batches(self, heldout: HeldoutSequences, limit: int | None) -> int:
        """Number of batches that a text takes; `limit` as everywhere counts batches of all ranks."""
        sequences = len(heldout) if limit is None else min(len(heldout), limit * self.batch_size)
        return -(-sequences // self.batch_per_group)

    def losses(
        self, heldout: Mapping[str, HeldoutSequences], limit: int | None = None, advance: OnProgress | None = None
    ) -> tuple[dict[str, float], dict[str, int]]:
        """(loss, tokens) of every domain's text under its own experts."""
        sums = {name: np.zeros(2) for name in heldout}
        for by_group in self._domain_rounds(heldout):
            most = [self.batches(heldout[name], limit) if name else 0 for name in by_group]
            for index in range(max(most)):
                now = [name if index < count else None for name, count in zip(by_group, most, strict=True)]
                self._add_losses(heldout, now, index, sums)
                self.model.processes.mark()
                if advance:
                    advance(sum(name is not None for name in now))
        return {n: float(s) / max(int(t), 1) for n, (s, t) in sums.items()}, {n: int(t) for n, (_, t) in sums.items()}

    def _domain_rounds(self, heldout: Mapping[str, HeldoutSequences]) -> list[tuple[str | None, ...]]:
        """The domain that each placement group measures, round by round."""
        names = self.model.groups.names
        by_group = [[names[domain_id] for domain_id in group if names[domain_id] in heldout] for group in self.domains]
        return list(zip_longest(*by_group))

    def _add_losses(
        self, heldout: Mapping[str, HeldoutSequences], now: list[str | None], index: int, sums: dict[str, np.ndarray]
    ) -> None:
        """Add batch `index` of each group's text to its `sums` (losses, tokens)."""
        length, names = self.model.config.data.sequence_length, self.model.groups.names
        ids = np.zeros((self.batch_size, length + 1), np.int32)
        mask = np.zeros((self.batch_size, length), np.float32)
        domain = np.zeros(self.batch_size, np.int32)
        idle = np.ones((self.batch_size, length), bool)
        for group, name in enumerate(now):
            rows = slice(group * self.batch_per_group, (group + 1) * self.batch_per_group)
            domain[rows] = self.domains[group].start
            if name is not None:
                ids[rows], mask[rows] = heldout[name].batch(index * self.batch_per_group, self.batch_per_group)
                domain[rows], idle[rows] = names.index(name), False
        planned, graph = self._planned(ids, mask, domain, idle)
        for group, (name, losses) in enumerate(zip(now, graph(planned), strict=True)):
            if name is not None:
                tokens = mask[group * self.batch_per_group : (group + 1) * self.batch_per_group].sum(dtype=np.float64)
                sums[name] += losses, tokens

    def _planned(
        self, ids: np.ndarray, mask: np.ndarray, domain: np.ndarray, idle: np.ndarray
    ) -> tuple[RoutedBatch, EvaluationGraph]:
        """The batch under the smallest graph that has room for it on all ranks."""
        for rows in self._rows:
            if rows not in self._graphs:
                self._graphs[rows] = EvaluationGraph(self.model, self.batch_size, rows)
            graph = self._graphs[rows]
            reads = graph.planner.reads
            try:
                planned = graph.planner(ids[reads], domain[reads], reads, 0, mask[reads], idle[reads])
            except CapacityExceeded:
                planned = None
            if not self.model.processes.any(planned is None):
                return planned, graph
        raise RuntimeError("a batch asks a slot for more rows than it has tokens")
