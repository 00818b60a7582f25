"""The compiled gradient steps of a run, made when they are first asked for: one process's own, or a mesh's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from mindspore import Tensor

from pangu_sigma.model.batch_planner import fixed_inputs
from pangu_sigma.model.graph_inputs import GraphSignature
from pangu_sigma.model.model import Model
from pangu_sigma.model.sharded_parameters import CutParameters, RehearsedParameters
from pangu_sigma.train.distributed.spmd_step import InContext, MeshContext, meshed_step
from pangu_sigma.train.objective import TrainingObjective
from pangu_sigma.train.step import GradientStep
from parallel.partition_spec import PartitionSpec, shard_slices, unshard

Step = Callable[..., tuple]


class StepGraphs:
    """The gradient steps of `signature`, one with shared gradients and one without."""

    def __init__(self, model: Model, signature: GraphSignature) -> None:
        self.model, self.signature = model, signature
        self._made: dict[bool, Step] = {}

    def clear(self) -> None:
        """Forget all: what they minimise has changed."""
        self._made.clear()

    def __call__(self, with_shared: bool, objective: TrainingObjective) -> Step:
        """The step; its inputs and outputs are `GradientStep`'s, of this rank's parts."""
        if with_shared not in self._made:
            self._made[with_shared] = self._make(with_shared, objective)
        return self._made[with_shared]

    def _make(self, with_shared: bool, objective: TrainingObjective) -> Step:
        return GradientStep(self.model.net, self.signature, self.model.layout, with_shared, objective)


class CutGraphs(StepGraphs):
    """Steps that MindSpore cuts over devices. The one with shared gradients is compiled at once: from then on the
    model's shared parameters are this rank's parts."""

    def __init__(self, model: Model, signature: GraphSignature, objective: TrainingObjective) -> None:
        super().__init__(model, signature)
        self.context = MeshContext(model, signature)
        self(True, objective)

    def _make(self, with_shared: bool, objective: TrainingObjective) -> Step:
        rank = self.model.processes.rank
        with self.context:
            step = meshed_step(self.model, self.signature, rank, with_shared, objective)
            step.compile()
        return InContext(step.cell, self.context)


class RehearsedGraphs(StepGraphs):
    """Steps of the same parts in and out, which every process computes whole of what all ranks give."""

    def _make(self, with_shared: bool, objective: TrainingObjective) -> Step:
        return RehearsedStep(super()._make(with_shared, objective), self.model, self.signature)


class Rehearsal:
    """Makes whole tensors of all ranks' parts, and parts of whole ones, where no device does it."""

    def __init__(self, model: Model, signature: GraphSignature) -> None:
        self.processes, self.shared = model.processes, model.shared
        fixed = fixed_inputs(signature.batch, signature.length).values()
        self.inputs = [(tuple(shape), cut) for shape, _, cut in (*fixed, *signature.sharded_inputs())]

    def whole(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """A graph's inputs, of which each rank gives its parts; also fills the network."""
        self.shared.fill()
        found = []
        for tensor, (shape, cut) in zip(inputs, self.inputs, strict=True):
            if not shape:
                found.append(tensor)
                continue
            parts = self.processes.gather(tensor.asnumpy())
            found.append(Tensor(unshard(parts, self.processes.mesh, shape, cut)))
        return found

    def part(self, tensor: Tensor, cut: PartitionSpec) -> Tensor:
        """This rank's part of a tensor that is cut so."""
        mine = shard_slices(self.processes.mesh, self.processes.rank, tensor.shape, cut)
        return Tensor(np.ascontiguousarray(tensor.asnumpy()[mine]))


class RehearsedStep:
    """A `GradientStep` of whole tensors behind the face of one that is cut."""

    def __init__(self, cell: GradientStep, model: Model, signature: GraphSignature) -> None:
        self.cell, self.rehearsal, self.learned = cell, Rehearsal(model, signature), model.learned
        cuts = [cut for _, _, cut in signature.sharded_inputs()]
        self.experts = [cuts[i] for i in signature.differentiated]
        self.parts = [model.shared.stored_slices(p.name) for p in model.shared.trainable]

    def set_train(self, mode: bool) -> RehearsedStep:
        self.cell.set_train(mode)
        return self

    def __call__(self, *inputs: Tensor) -> tuple:
        part = self.rehearsal.part
        by_sample, auxiliary, counts, by_expert, shared, _ = self.cell(*self.rehearsal.whole(inputs))
        if self.learned:
            counts = [part(rows, ("rows", 1)) for rows in counts]
        by_expert = [part(g, cut) for g, cut in zip(by_expert, self.experts, strict=True)]
        arrays = [g.asnumpy() for g in shared]
        mine = [np.ascontiguousarray(a[p]) for a, p in zip(arrays, self.parts[: len(arrays)], strict=True)]
        squares = np.array([np.square(a, dtype=np.float64).sum() for a in mine])
        return part(by_sample, ("rows",)), auxiliary, counts, by_expert, [Tensor(a) for a in mine], Tensor(squares)


def step_graphs(model: Model, signature: GraphSignature, objective: TrainingObjective) -> StepGraphs:
    """The steps of a model, in the form that its layout and its processes ask for."""
    if isinstance(model.shared, RehearsedParameters):
        return RehearsedGraphs(model, signature)
    if isinstance(model.shared, CutParameters):
        return CutGraphs(model, signature, objective)
    return StepGraphs(model, signature)
