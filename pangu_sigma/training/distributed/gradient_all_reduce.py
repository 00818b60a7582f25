"""Gradient all-reduce and global norm: from every process's gradients to those of the whole batch.

1. Shared parameters: summed over all processes, bucket by bucket.
2. Domain embeddings, which every process has: likewise, domain by domain.
3. Experts: rows have come to their experts already, so the gradients of an expert part lack only those of its replicas
   along the data axis, which saw other rows. They are summed over these replicas.

In an SPMD graph MindSpore does all of this inside the graph; only the norm is left. Collectives run outside any
graph, on the main thread of every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from mindspore import Tensor

from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from pangu_sigma.training.gradient_reducer import GradientReducer, root
from pangu_sigma.training.gradients import Gradients
from pangu_sigma.training.schedule import Phase
from pangu_sigma.training.step_metrics import BatchMetrics, updated_domains, updated_experts

BUCKET_BYTES = 32 << 20  # of gradients that travel at once


class AllReducer(GradientReducer):
    """Sums over the processes of a model. All call its methods together.

    `exchange_ranks`: the ranks whose rows came to this process's experts; `reader_ranks`: ranks that together have read
    each row of the batch once.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.processes, self.mesh = model.processes, model.processes.mesh
        rank = self.processes.rank
        self.exchange_ranks: Sequence[int] = self.mesh.exchange_group(rank)
        self.reader_ranks: Sequence[int] = range(self.processes.size)
        self.replicas = self.mesh.replica_group(rank)

    def total(self, value: float) -> float:
        return float(self.processes.gather(np.array([value]))[list(self.reader_ranks)].sum(axis=0)[0])

    def sum_metrics(self, own: BatchMetrics) -> tuple[BatchMetrics, BatchMetrics]:
        by_rank = own.gather(self.processes)
        received = own.sum_ranks(by_rank[list(self.exchange_ranks)])
        return received, own.sum_ranks(by_rank[list(self.reader_ranks)])

    def reduce_in_place(self, gradients: Gradients, metrics: Sequence[BatchMetrics], phase: Phase) -> None:
        # 1. Shared parameters.
        if gradients.shared:
            gradients.shared = self._all_reduced(gradients.shared)
            gradients.shared_squares = self.model.store.square_sums(gradients.shared)
        # 2. Domain embeddings.
        domains = range(len(self.model.groups.names))
        by_domain = {domain_id: gradients.experts.pop((DOMAIN_EMBEDDING, domain_id), None) for domain_id in domains}
        if DOMAIN_EMBEDDING in self.model.store.experts:
            gradients.experts |= self._embeddings_all_reduced(by_domain, metrics, phase)
        # 3. Experts.
        if self.mesh.data > 1:
            gradients.experts = self._experts_reduced(gradients.experts, metrics, phase)

    def global_norm(self, gradients: Gradients) -> float:
        """Shared parameters and domain embeddings count once, experts wherever they are."""
        shared, by_layer = gradients.square_sums(self.model.store)
        replicated = float(shared.sum()) + by_layer.pop(DOMAIN_EMBEDDING, 0.0)
        # Replicas hold the same experts; the first of them counts them for all.
        local = sum(by_layer.values(), 0.0) if self.replicas[0] == self.processes.rank else 0.0
        return root(replicated + float(self.processes.total(np.array([local]))[0]))

    def _all_reduced(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sums over all processes of some tensors."""
        sums: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = np.concatenate([t.asnumpy().reshape(-1) for t in bucket])
            sums += _split(self.processes.sum_float32(flat), [t.shape for t in bucket])
        return tuple(sums)

    def _embeddings_all_reduced(
        self, by_domain: dict[int, list[Tensor] | None], metrics: Sequence[BatchMetrics], phase: Phase
    ) -> dict[tuple[str, int], list[Tensor]]:
        shape = self.model.store.shapes[DOMAIN_EMBEDDING]["word"]
        sums = {}
        for domain_id in updated_domains(metrics, self.model.groups, phase.domains):
            local = by_domain[domain_id]
            values = local[0].asnumpy() if local else np.zeros(shape, np.float32)
            sums[(DOMAIN_EMBEDDING, domain_id)] = [Tensor.from_numpy(self.processes.sum_float32(values))]
        return sums

    def _experts_reduced(
        self, local: dict[tuple[str, int], list[Tensor]], metrics: Sequence[BatchMetrics], phase: Phase
    ) -> dict[tuple[str, int], list[Tensor]]:
        """The sums of expert gradients over the data axis. Collectives are of all processes, so all expert parts take
        part: the i-th expert of every part travels if that of any part received a row."""
        activated, experts = updated_experts(metrics, self.model.groups, phase.domains), self.model.local_experts
        sums = {key: tensors for key, tensors in local.items() if key[0] == DOMAIN_EMBEDDING}
        for layer, layer_name in enumerate(self.model.config.model.sparse_prefixes):
            shapes = list(self.model.store.shapes[layer_name].values())
            size = sum(int(np.prod(s)) for s in shapes)
            travelling = np.flatnonzero(activated[layer].reshape(-1, len(experts)).any(axis=0)).tolist()
            at_once = max(1, BUCKET_BYTES // (4 * size))
            for start in range(0, len(travelling), at_once):
                bucket = travelling[start : start + at_once]
                flat = np.zeros((len(bucket), size), np.float32)
                for row, expert in zip(flat, bucket, strict=True):
                    tensors = local.get((layer_name, expert))
                    if tensors is not None:
                        np.concatenate([t.asnumpy().reshape(-1) for t in tensors], out=row)
                by_rank = self.processes.gather(flat)
                total = by_rank[self.replicas[0]].copy()
                for rank in self.replicas[1:]:
                    total += by_rank[rank]
                for row, expert in zip(total, bucket, strict=True):
                    if activated[layer, experts.start + expert]:
                        sums[(layer_name, expert)] = _split(row, shapes)
        return sums


class SpmdReducer(AllReducer):
    """The same of an SPMD graph, which sums over ranks itself and leaves a rank its shards of the sums."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        mesh, rank = self.mesh, self.processes.rank
        # Each pipeline stage reads all rows; the last one knows what they gave.
        last = range(mesh.size - mesh.stage_size, mesh.size)
        self.reader_ranks = [r for r in last if mesh.coordinates(r).tensor == 0]
        self.exchange_ranks = [r for r in self.reader_ranks if mesh.row_rank(r) in mesh.placement_rows(rank)]
        # A shard that several ranks have is divided by their number, so that the sum over all ranks counts it once.
        ranks_of = [model.shared.storing_ranks(p.name) for p in model.shared.trainable]
        self.weights = np.array([1.0 / (self.processes.size if ranks is None else len(ranks)) for ranks in ranks_of])
        self.expert_weights = [1.0 / shard.gradient_copies for shard in model.expert_shards.values()]

    def reduce_in_place(self, gradients: Gradients, metrics: Sequence[BatchMetrics], phase: Phase) -> None:
        """Nothing is left to do."""

    def global_norm(self, gradients: Gradients) -> float:
        """Each shard of a shared parameter and of an expert counts once."""
        shared, by_layer = gradients.square_sums(self.model.store, self.expert_weights)
        local = float((shared * self.weights[: shared.size]).sum()) + sum(by_layer.values(), 0.0)
        return root(float(self.processes.total(np.array([local]))[0]))


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


def _split(flat: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors of these shapes that lie end to end in `flat`, whose memory they share."""
    tensors, offset = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        tensors.append(Tensor.from_numpy(flat[offset : offset + size].reshape(shape)))
        offset += size
    return tensors
