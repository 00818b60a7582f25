"""Frozen gate columns: those of a learned gate whose experts do not train keep every bit while the rest trains.

An expert that a phase freezes would still change what it is given if its gate column moved: the column is frozen with
it (Lifelong-MoE: Chen et al. 2023, arXiv 2305.12281, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, Tensor

from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import gate_weight
from pangu_sigma.training.gradients import trained_experts
from pangu_sigma.training.schedule import Phase
from rre.router_specs import RouterSpec
from rre.routers import ExpertGroups


class FrozenGateColumns:
    """The gates' tensors among `names` (the shared parameters in order) that have a column for each expert, and the
    columns of the experts of untrained domains.

    Columns must be masked before the global norm, so that they do not count in clipping, and restored after the update,
    because weight decay and old moments would move them.
    """

    def __init__(
        self, spec: RouterSpec, names: Sequence[str], groups: ExpertGroups, trained: frozenset[str]
    ) -> None:
        self.columns = np.flatnonzero(~trained_experts(groups, trained))
        weights = [gate_weight(name, spec) for name in names] if self.columns.size else []
        self.gates = [i for i, weight in enumerate(weights) if weight is not None and weight.by_expert]

    @classmethod
    def of_phase(cls, model: Model, phase: Phase) -> FrozenGateColumns | None:
        """The columns that `phase` leaves as they are; None where there are none."""
        if not (model.learned and phase.shared) or phase.domains.issuperset(model.groups.names):
            return None
        names = [p.name for p in model.shared.trainable]
        frozen = cls(model.config.model.router_spec, names, model.groups, phase.domains)
        return frozen if frozen.gates else None

    def mask_gradients(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients with zeros in the frozen columns."""
        changed = list(gradients)
        for i in self.gates:
            array = gradients[i].asnumpy().copy()
            array[..., self.columns] = 0.0
            changed[i] = Tensor(array)
        return tuple(changed)

    @contextmanager
    def restored(self, *groups: Sequence[Parameter]) -> Iterator[None]:
        """Set the frozen columns of `groups` (parameters, and moments in the same order) back when the block ends."""
        gates = [group[i] for group in groups for i in self.gates]
        before = [gate.asnumpy()[..., self.columns].copy() for gate in gates]
        yield
        for gate, columns in zip(gates, before, strict=True):
            array = gate.asnumpy().copy()
            array[..., self.columns] = columns
            gate.set_data(Tensor(array))
