"""Columns of a learned gate whose experts do not train keep every bit while the rest of the gate trains.

An expert that a phase freezes would still change what it is given if its gate column moved: the column is frozen with
it (Lifelong-MoE: Chen et al. 2023, arXiv 2305.12281, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, Tensor

from rre.routers import ExpertGroups

# Parameters [D, E] of learned gates, one column for each expert of their layer.
_BY_EXPERT = (".router.weight", ".router.noise_weight")


class FrozenColumns:
    """The gates among `names` (the shared parameters in order) and the columns of the experts of untrained domains."""

    def __init__(self, names: Sequence[str], groups: ExpertGroups, trained: frozenset[str]) -> None:
        owner = np.repeat(groups.names, groups.sizes)
        self.columns = np.flatnonzero([name not in trained for name in owner])
        self.gates = [i for i, name in enumerate(names) if name.endswith(_BY_EXPERT)] if self.columns.size else []

    def __bool__(self) -> bool:
        return bool(self.gates)

    def without(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients with zeros in these columns."""
        changed = list(gradients)
        for i in self.gates:
            array = gradients[i].asnumpy().copy()
            array[:, self.columns] = 0.0
            changed[i] = Tensor(array)
        return tuple(changed)

    @contextmanager
    def kept(self, *parts: Sequence[Parameter]) -> Iterator[None]:
        """Whatever the block does to `parts` (parameters and moments in order), these columns are as before."""
        gates = [part[i] for part in parts for i in self.gates]
        before = [gate.asnumpy()[:, self.columns].copy() for gate in gates]
        yield
        for gate, columns in zip(gates, before, strict=True):
            array = gate.asnumpy().copy()
            array[:, self.columns] = columns
            gate.set_data(Tensor(array))
