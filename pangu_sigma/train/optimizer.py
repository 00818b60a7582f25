"""One optimizer over two worlds: shared parameters in the graph, activated experts in their store, one global norm."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from pangu_sigma.config import Config
from pangu_sigma.model.model import Model
from pangu_sigma.train.continual.frozen_gate_columns import FrozenGateColumns
from pangu_sigma.train.step import SharedUpdate
from rre.adamw import AdamWHyperparameters
from rre.store import ExpertStore


@dataclass
class Gradients:
    """Gradients of one optimizer step, summed over its micro-batches.

    `experts`: (layer name, expert) -> its tensors' gradients; only experts that received a token. `shared_squares` are
    the square sums [n] of `shared` where they came with the gradients (a single micro-batch), else None.
    """

    shared: tuple[Tensor, ...] = ()
    experts: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    shared_squares: np.ndarray | None = None

    def add(self, other: Gradients) -> None:
        """Sum in another micro-batch's gradients; the order of the sum is the order of the micro-batches."""
        self.shared = tuple(a + b for a, b in zip(self.shared, other.shared, strict=True))
        for key, tensors in other.experts.items():
            mine = self.experts.get(key)
            self.experts[key] = tensors if mine is None else [a + b for a, b in zip(mine, tensors, strict=True)]
        self.shared_squares = None

    def squares(
        self, store: ExpertStore, counted: Sequence[float] | None = None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Square sums of the shared gradients [n], and of the activated experts' by layer, as float32 sums per tensor
        or block of one; `counted`: how much each tensor of an expert counts, 1 where it is not said."""
        shared = self.shared_squares
        if shared is None:
            half_square = ops.L2Loss()
            shared = np.array([2.0 * float(half_square(t).asnumpy()) for t in self.shared])
        by_layer: dict[str, list[Tensor]] = {}
        for (layer_name, _), tensors in self.experts.items():
            by_layer.setdefault(layer_name, []).extend(tensors)
        sums = {layer_name: store.square_sums(tensors) for layer_name, tensors in by_layer.items()}
        if counted is not None:
            sums = {layer_name: found.reshape(-1, len(counted)) * counted for layer_name, found in sums.items()}
        return shared, {layer_name: float(found.sum()) for layer_name, found in sums.items()}


class Optimizer:
    """AdamW for all that trains; experts that received no token are not touched."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.update_shared = SharedUpdate(model.shared.trainable, model.layout)
        self.shared_steps = 0

    def apply(
        self, gradients: Gradients, learning_rate: float, scale: float, frozen: FrozenGateColumns | None = None
    ) -> None:
        """One step with gradients * `scale` (clipping and loss scale); `frozen` columns of gates keep every bit."""
        config: Config = self.model.config
        wanted = config.optimizer
        if gradients.shared:
            self.shared_steps += 1
            hyper = AdamWHyperparameters(learning_rate, wanted.beta1, wanted.beta2, wanted.epsilon, wanted.weight_decay)
            rate, epsilon, decay = hyper.correct_bias(self.shared_steps)
            values = (scale, rate, wanted.beta1, wanted.beta2, epsilon, decay)
            update = self.update_shared
            with frozen.restored(update.parameters, update.m, update.v) if frozen else nullcontext():
                update(*(Tensor(v, ms.float32) for v in values), *gradients.shared)
        hyper = AdamWHyperparameters(
            learning_rate, wanted.beta1, wanted.beta2, wanted.expert_epsilon, wanted.weight_decay
        )
        for (layer_name, expert), tensors in gradients.experts.items():
            self.model.store.apply(layer_name, expert, tensors, hyper, scale)

    def moments(self) -> dict[str, np.ndarray]:
        """Shared moments by checkpoint name, as float32 arrays."""
        update = self.update_shared
        return {p.name: p.asnumpy() for p in (*update.m, *update.v)}

    def restore(self, tensors: dict[str, np.ndarray], shared_steps: int) -> None:
        """Set moments by checkpoint name and the number of shared updates."""
        update = self.update_shared
        for moments in (update.m, update.v):
            for owner, parameter in zip(update.parameters, moments, strict=True):
                part = tensors[parameter.name][self.model.shared.stored_slices(owner.name)]
                parameter.set_data(Tensor(np.ascontiguousarray(part)))
        self.shared_steps = shared_steps
