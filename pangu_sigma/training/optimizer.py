"""AdamW over two kinds of weights: shared parameters on the device, activated experts in their store.

Experts have their own epsilon and their own step counts; a step that does not activate one leaves it as it is. The
global norm is `gradient_reducer`'s; the trainer clips by the factor that it gives to `apply`.
"""

from __future__ import annotations

from contextlib import nullcontext

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.config import Config
from pangu_sigma.model.model import Model
from pangu_sigma.training.frozen_gate_columns import FrozenGateColumns
from pangu_sigma.training.gradients import Gradients
from pangu_sigma.training.step import SharedUpdate
from rre.adamw import AdamWHyperparameters


class Optimizer:
    """AdamW for all that trains; experts that received no token are not touched.

    shared_steps: updates of the shared parameters so far, which their bias correction counts.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.update_shared = SharedUpdate(model.shared.trainable, model.layout)
        self.shared_steps = 0

    def apply(
        self, gradients: Gradients, learning_rate: float, scale: float, frozen: FrozenGateColumns | None = None
    ) -> None:
        """Update once with gradients * `scale` (clipping and loss scale); `frozen` columns of gates keep every bit.

        The expert store may do its updates in a thread of its own and returns before they are done.
        """
        config: Config = self.model.config
        settings = config.optimizer
        if gradients.shared:
            self.shared_steps += 1
            hyper = AdamWHyperparameters(
                learning_rate, settings.beta1, settings.beta2, settings.epsilon, settings.weight_decay
            )
            rate, epsilon, decay = hyper.correct_bias(self.shared_steps)
            values = (scale, rate, settings.beta1, settings.beta2, epsilon, decay)
            update = self.update_shared
            with frozen.restored(update.parameters, update.m, update.v) if frozen else nullcontext():
                update(*(Tensor(v, ms.float32) for v in values), *gradients.shared)
        hyper = AdamWHyperparameters(
            learning_rate, settings.beta1, settings.beta2, settings.expert_epsilon, settings.weight_decay
        )
        for (layer_name, expert), tensors in gradients.experts.items():
            self.model.store.apply(layer_name, expert, tensors, hyper, scale)

    def moments(self) -> dict[str, np.ndarray]:
        """Moments of the shared parameters by checkpoint name, as float32 arrays."""
        update = self.update_shared
        return {p.name: p.asnumpy() for p in (*update.m, *update.v)}

    def restore(self, tensors: dict[str, np.ndarray], shared_steps: int) -> None:
        """Set the shared parameters' moments from checkpoint tensors by name, and the number of updates."""
        update = self.update_shared
        for moments in (update.m, update.v):
            for owner, parameter in zip(update.parameters, moments, strict=True):
                shard = tensors[parameter.name][self.model.shared.stored_slices(owner.name)]
                parameter.set_data(Tensor(np.ascontiguousarray(shard)))
        self.shared_steps = shared_steps
