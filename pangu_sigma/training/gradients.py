"""Gradients of an optimizer step: of shared parameters and of the experts that received a token.

A graph gives the gradients of all its expert inputs; `GraphInputs` knows whose weights those inputs were. An expert
without tokens, or of a domain that does not train, gets no gradient at all, so that the optimizer does not touch it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, ops

from rre.routers import ExpertGroups
from rre.store import ExpertStore

# (layer name, expert as this process's store counts) -> gradients of the expert's tensors.
ExpertGradients = dict[tuple[str, int], list[Tensor]]


@dataclass
class Gradients:
    """Gradients of one optimizer step, summed over its micro-batches.

    shared: in the order of the trained shared parameters. experts: only those that received a token and train.
    shared_squares: square sums [n] of `shared` where they came with the gradients (a single micro-batch), else None.
    """

    shared: tuple[Tensor, ...] = ()
    experts: ExpertGradients = field(default_factory=dict)
    shared_squares: np.ndarray | None = None

    def add(self, other: Gradients) -> None:
        """Sum in another micro-batch's gradients; the order of the sum is the order of the micro-batches."""
        self.shared = tuple(a + b for a, b in zip(self.shared, other.shared, strict=True))
        for key, tensors in other.experts.items():
            sums = self.experts.get(key)
            self.experts[key] = tensors if sums is None else [a + b for a, b in zip(sums, tensors, strict=True)]
        self.shared_squares = None

    def square_sums(
        self, store: ExpertStore, tensor_weights: Sequence[float] | None = None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Square sums for the global norm: of the shared gradients [n], and of all experts' by layer name.

        Sums are float32 per tensor or block of one. tensor_weights: how much each tensor of an expert counts, 1 for
        None.
        """
        shared = self.shared_squares
        if shared is None:
            half_square = ops.L2Loss()
            shared = np.array([2.0 * float(half_square(t).asnumpy()) for t in self.shared])
        by_layer: dict[str, list[Tensor]] = {}
        for (layer_name, _), tensors in self.experts.items():
            by_layer.setdefault(layer_name, []).extend(tensors)
        sums = {layer_name: store.square_sums(tensors) for layer_name, tensors in by_layer.items()}
        if tensor_weights is not None:
            sums = {name: array.reshape(-1, len(tensor_weights)) * tensor_weights for name, array in sums.items()}
        return shared, {layer_name: float(array.sum()) for layer_name, array in sums.items()}


def trained_experts(groups: ExpertGroups, trained_domains: Collection[str]) -> np.ndarray:
    """Whether an expert's domain trains, by its position on a layer's expert axis: bool [E]."""
    return np.repeat([name in trained_domains for name in groups.names], groups.sizes)
