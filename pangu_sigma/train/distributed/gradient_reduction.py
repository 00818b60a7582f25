"""From every process's gradients to those of the whole batch, and the numbers that all processes decide by.

Shared parameters: the sum over all processes. Embedding slots, which every process has: likewise, domain by domain.
Experts: rows have come to their experts already, so an expert part is complete but for its replicas along the data
axis, which saw other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from mindspore import Tensor

from pangu_sigma.model.model import SLOTS, Model
from pangu_sigma.train.optimizer import Gradients
from pangu_sigma.train.schedule import Phase
from pangu_sigma.train.step_metrics import Figures

BUCKET_BYTES = 32 << 20  # of gradients that travel at once


class Reduction:
    """Sums gradients over the processes of a model; a process that is alone changes nothing. All call it together."""

    def __init__(self, model: Model) -> None:
        self.model, self.processes = model, model.processes
        mesh, rank = self.processes.mesh, self.processes.rank
        self.mesh = mesh
        self.exchange_ranks = mesh.exchange_group(rank)  # ranks whose rows came to this one's experts
        self.reader_ranks: Sequence[int] = range(self.processes.size)  # ranks that have read each row of the batch once
        self.replicas = mesh.replica_group(rank)

    def __call__(self, gradients: Gradients, parts: Sequence[Figures], phase: Phase) -> None:
        """Make `gradients` those of the whole batch, of which `parts` are the micro-batches' figures."""
        if self.processes.size == 1:
            return
        if gradients.shared:
            gradients.shared = self._everywhere(gradients.shared)
            gradients.shared_squares = self.model.store.square_sums(gradients.shared)
        slots = {number: gradients.experts.pop((SLOTS, number), None) for number in range(len(self.model.groups.names))}
        if SLOTS in self.model.store.experts:
            gradients.experts |= self._slots(slots, parts, phase)
        if self.mesh.data > 1:
            gradients.experts = self._over_replicas(gradients.experts, parts, phase)

    def norm(self, gradients: Gradients) -> float:
        """The global norm: shared parameters and slots count once, experts wherever they are."""
        shared, by_layer = gradients.squares(self.model.store)
        everywhere = float(shared.sum()) + by_layer.pop(SLOTS, 0.0)
        # Replicas hold the same experts; the first of them speaks for all.
        mine = sum(by_layer.values(), 0.0) if self.replicas[0] == self.processes.rank else 0.0
        return _root(everywhere + float(self.processes.total(np.array([mine]))[0]))

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum, over all rows of the batch, of values float64 that each process counted of its own."""
        return self.processes.gather(values)[list(self.reader_ranks)].sum(axis=0)

    def touched(self, parts: Sequence[Figures], phase: Phase) -> int:
        """Experts, of all processes, that the step updates; embedding slots included."""
        slots = len(self._present(parts, phase)) if SLOTS in self.model.store.experts else 0
        return slots + int(self._activated(parts, phase).sum())

    def _activated(self, parts: Sequence[Figures], phase: Phase) -> np.ndarray:
        """Whether an expert received a row of the batch and trains, bool [layers, E]."""
        groups = self.model.groups
        trains = np.repeat([name in phase.domains for name in groups.names], groups.sizes)
        return (sum(figures.load for figures in parts) > 0) & trains

    def _present(self, parts: Sequence[Figures], phase: Phase) -> list[int]:
        """Domains with text in the batch that train."""
        names = self.model.groups.names
        tokens = sum(figures.tokens for figures in parts)
        return [number for number in np.flatnonzero(tokens).tolist() if names[number] in phase.domains]

    def _everywhere(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sum over all processes of some tensors."""
        found: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = np.concatenate([t.asnumpy().reshape(-1) for t in bucket])
            found += _cut(self.processes.sum_float32(flat), [t.shape for t in bucket])
        return tuple(found)

    def _slots(
        self, mine: dict[int, list[Tensor] | None], parts: Sequence[Figures], phase: Phase
    ) -> dict[tuple[str, int], list[Tensor]]:
        shape = self.model.store.shapes[SLOTS]["word"]
        found = {}
        for number in self._present(parts, phase):
            here = mine[number][0].asnumpy() if mine[number] else np.zeros(shape, np.float32)
            found[(SLOTS, number)] = [Tensor.from_numpy(self.processes.sum_float32(here))]
        return found

    def _over_replicas(
        self, mine: dict[tuple[str, int], list[Tensor]], parts: Sequence[Figures], phase: Phase
    ) -> dict[tuple[str, int], list[Tensor]]:
        """Sum expert gradients over the data axis. Collectives are of all processes, so all expert parts move along:
        the i-th expert of every part travels if that of any part received a row."""
        activated, held = self._activated(parts, phase), self.model.local_experts
        share = len(held)
        found = {key: tensors for key, tensors in mine.items() if key[0] == SLOTS}
        for layer, layer_name in enumerate(self.model.config.model.sparse_prefixes):
            shapes = list(self.model.store.shapes[layer_name].values())
            size = sum(int(np.prod(s)) for s in shapes)
            moving = np.flatnonzero(activated[layer].reshape(-1, share).any(axis=0)).tolist()
            at_once = max(1, BUCKET_BYTES // (4 * size))
            for start in range(0, len(moving), at_once):
                experts = moving[start : start + at_once]
                flat = np.zeros((len(experts), size), np.float32)
                for row, expert in zip(flat, experts, strict=True):
                    tensors = mine.get((layer_name, expert))
                    if tensors is not None:
                        np.concatenate([t.asnumpy().reshape(-1) for t in tensors], out=row)
                lines = self.processes.gather(flat)
                total = lines[self.replicas[0]].copy()
                for rank in self.replicas[1:]:
                    total += lines[rank]
                for row, expert in zip(total, experts, strict=True):
                    if activated[layer, held.start + expert]:
                        found[(layer_name, expert)] = _cut(row, shapes)
        return found


class MeshedReduction(Reduction):
    """For a graph that is cut over devices: sums over ranks are made inside it, and a rank has its parts of them."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        mesh, rank = self.mesh, self.processes.rank
        # Each pipeline stage reads all rows; the last one knows what they gave.
        last = range(mesh.size - mesh.stage_size, mesh.size)
        self.reader_ranks = [r for r in last if mesh.coordinates(r).tensor == 0]
        self.exchange_ranks = [r for r in self.reader_ranks if mesh.row_rank(r) in mesh.placement_rows(rank)]
        # Of what several ranks hold each counts its share, so that the sum over all counts it once.
        holders = [model.shared.storing_ranks(p.name) for p in model.shared.trainable]
        self.weights = np.array([1.0 / (self.processes.size if ranks is None else len(ranks)) for ranks in holders])
        self.of_experts = [1.0 / shard.gradient_copies for shard in model.expert_shards.values()]

    def __call__(self, gradients: Gradients, parts: Sequence[Figures], phase: Phase) -> None:
        """Nothing is left to do."""

    def norm(self, gradients: Gradients) -> float:
        """The global norm: each part of a shared parameter and of an expert counts once."""
        shared, by_layer = gradients.squares(self.model.store, self.of_experts)
        mine = float((shared * self.weights[: shared.size]).sum()) + sum(by_layer.values(), 0.0)
        return _root(float(self.processes.total(np.array([mine]))[0]))


def reduction_of(model: Model) -> Reduction:
    """What this model's gradients need."""
    meshed = model.layout.spmd_mesh is not None and model.processes.size > 1
    return (MeshedReduction if meshed else Reduction)(model)


def _root(squares: float) -> float:
    return math.sqrt(squares) if squares >= 0 else math.nan


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


def _cut(flat: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors of these shapes that lie end to end in `flat`, whose memory they share."""
    found, at = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        found.append(Tensor.from_numpy(flat[at : at + size].reshape(shape)))
        at += size
    return found
