"""Held-out loss under a graph that is cut over devices: nothing is dropped, placement groups measure side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.model.batch_planner import BatchPlanner, RoutedBatch, graph_placeholders
from pangu_sigma.model.graph_inputs import GraphSignature
from pangu_sigma.model.model import Model
from pangu_sigma.model.pangu import TrainingLoss
from pangu_sigma.model.sharded_parameters import RehearsedParameters
from pangu_sigma.train.distributed.spmd_step import InContext, MeshContext
from pangu_sigma.train.distributed.step_cache import Rehearsal
from rre.dispatch.capacity_dispatch import CapacityExceeded

Advance = Callable[[int], None]

# Of what even routing gives a slot: more rows than this, and the graph with room for everything measures the batch.
USUAL = 2.0


class GroupSums(nn.Cell):
    """A graph's inputs -> for each placement group the loss sum of the rows that it reads, float32 [].

    As numbers, because MindSpore cuts whatever else an evaluation gives over all devices, however the rows were cut.
    """

    def __init__(self, model: Model, signature: GraphSignature) -> None:
        super().__init__(auto_prefix=False)
        layout, groups = model.layout, model.processes.mesh.placement_groups
        self.loss = TrainingLoss(model.net, layout, signature)
        reads = np.repeat(np.eye(groups, dtype=np.float32), signature.batch // groups, axis=1)
        self.reads = [Tensor(of_group) for of_group in reads]
        self.mul = layout(ops.Mul(), ("rows",), ("rows",))
        self.sum = layout(ops.ReduceSum(), ("rows",))
        self.set_train(False)
        inputs = graph_placeholders(signature.batch, signature.length, layout).values()
        self.set_inputs(*inputs, *signature.placeholders(layout))

    def construct(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        _, by_sample, _, _ = self.loss(*inputs)
        found = ()
        for of_group in self.reads:
            found = found + (self.sum(self.mul(by_sample, of_group)),)
        return found


class Measurement:
    """One evaluation graph, whose slots take so many `rows` of a shard: a planned batch -> loss sums by group [G]."""

    def __init__(self, model: Model, batch: int, rows: int) -> None:
        self.model, self.signature = model, model.mesh_evaluation_signature(batch, rows)
        self.planner = BatchPlanner(model, self.signature, training=False)
        self.cell = GroupSums(model, self.signature)
        rehearsed = isinstance(model.shared, RehearsedParameters)
        self.rehearsal = Rehearsal(model, self.signature) if rehearsed else None
        self.graph = self.cell if rehearsed else InContext(self.cell, MeshContext(model, self.signature))

    def __call__(self, planned: RoutedBatch) -> np.ndarray:
        fixed = planned.fixed
        inputs = [
            fixed[0], Tensor(planned.labels), Tensor(planned.mask), Tensor(np.float32(0.0)), *fixed[1:],
            *planned.flat(self.signature, self.model.store),
        ]  # fmt: skip
        # The network is shared with the training step, so its mode is set per use.
        self.graph.set_train(False)
        sums = self.graph(*(inputs if self.rehearsal is None else self.rehearsal.whole(inputs)))
        return np.array([float(of_group.asnumpy()) for of_group in sums])


class MeshEvaluator:
    """Measures held-out sequences on all ranks of a mesh, `batch_size` at a time; see `evaluation.domain_evaluation`.

    A placement group holds its own domains' experts alone, so it measures their texts, one after the other, while the
    other groups measure theirs.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.figures: dict[str, float] = {}
        self.mesh = model.processes.mesh
        self.groups = self.mesh.domains_of_groups(model.groups.sizes)
        self.at_once = batch_size // self.mesh.placement_groups
        # Rows that a slot can be asked for at all, and usually is.
        most = batch_size // self.mesh.rows * model.config.data.sequence_length
        usual = math.ceil(USUAL * most * model.config.experts_per_token / max(1, min(model.groups.sizes, default=1)))
        self._rows = [most] if model.learned or usual >= most else [usual, most]
        self._made: dict[int, Measurement] = {}

    def batches(self, heldout: HeldoutSequences, limit: int | None) -> int:
        """Number of batches that a text takes; `limit` as everywhere counts batches of all ranks."""
        sequences = len(heldout) if limit is None else min(len(heldout), limit * self.batch_size)
        return -(-sequences // self.at_once)

    def losses(
        self, heldout: Mapping[str, HeldoutSequences], limit: int | None = None, advance: Advance | None = None
    ) -> tuple[dict[str, float], dict[str, int]]:
        """(loss, tokens) of every domain's text under its own experts."""
        sums = {name: np.zeros(2) for name in heldout}
        for turn in self._turns(heldout):
            most = [self.batches(heldout[name], limit) if name else 0 for name in turn]
            for number in range(max(most)):
                now = [name if number < count else None for name, count in zip(turn, most, strict=True)]
                self._measure(heldout, now, number, sums)
                self.model.processes.mark()
                if advance:
                    advance(sum(name is not None for name in now))
        return {n: float(s) / max(int(t), 1) for n, (s, t) in sums.items()}, {n: int(t) for n, (_, t) in sums.items()}

    def _turns(self, heldout: Mapping[str, HeldoutSequences]) -> list[tuple[str | None, ...]]:
        """Which text each placement group measures, turn by turn."""
        names = self.model.groups.names
        mine = [[names[number] for number in group if names[number] in heldout] for group in self.groups]
        return list(zip_longest(*mine))

    def _measure(
        self, heldout: Mapping[str, HeldoutSequences], now: list[str | None], number: int, sums: dict[str, np.ndarray]
    ) -> None:
        """Add batch `number` of each group's text to its `sums` (losses, tokens)."""
        length, names = self.model.config.data.sequence_length, self.model.groups.names
        ids = np.zeros((self.batch_size, length + 1), np.int32)
        mask = np.zeros((self.batch_size, length), np.float32)
        domain = np.zeros(self.batch_size, np.int32)
        idle = np.ones((self.batch_size, length), bool)
        for group, name in enumerate(now):
            rows = slice(group * self.at_once, (group + 1) * self.at_once)
            domain[rows] = self.groups[group].start
            if name is not None:
                ids[rows], mask[rows] = heldout[name].batch(number * self.at_once, self.at_once)
                domain[rows], idle[rows] = names.index(name), False
        planned, graph = self._planned(ids, mask, domain, idle)
        for group, (name, losses) in enumerate(zip(now, graph(planned), strict=True)):
            if name is not None:
                tokens = mask[group * self.at_once : (group + 1) * self.at_once].sum(dtype=np.float64)
                sums[name] += losses, tokens

    def _planned(
        self, ids: np.ndarray, mask: np.ndarray, domain: np.ndarray, idle: np.ndarray
    ) -> tuple[RoutedBatch, Measurement]:
        """The batch under the smallest graph that has room for it on all ranks."""
        for rows in self._rows:
            if rows not in self._made:
                self._made[rows] = Measurement(self.model, self.batch_size, rows)
            graph = self._made[rows]
            reads = graph.planner.reads
            try:
                planned = graph.planner(ids[reads], domain[reads], reads, 0, mask[reads], idle[reads])
            except CapacityExceeded:
                planned = None
            if not self.model.processes.any(planned is None):
                return planned, graph
        raise RuntimeError("a batch asks a slot for more rows than it has tokens")
