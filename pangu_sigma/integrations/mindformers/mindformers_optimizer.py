"""Our AdamW and our schedule as MindFormers' optimizer and learning-rate classes.

MindFormers' own AdamW moves an expert that received no token: its moments decay, its weight decays. Here such an expert
keeps every bit of weights, moments and step count, as everywhere in this product.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops
from mindspore.nn.learning_rate_schedule import LearningRateSchedule
from mindspore.nn.optim.optimizer import Optimizer

from pangu_sigma.errors import UserError
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from pangu_sigma.wording import shown

KINDS = ("cosine", "linear", "constant")


class PanGuSigmaLR(LearningRateSchedule):
    """`lr_schedule`: linear warm-up, then cosine, linear or no decay to `min_lr_ratio`; see `train.schedule`.

    `total_steps` is the step at which the decay ends; -1 lets MindFormers fill in the run's steps.
    """

    def __init__(
        self, learning_rate: float, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.1,
        kind: str = "cosine",
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"lr_schedule.kind is {shown(kind)}: set it to {', '.join(KINDS)}")
        self.peak, self.final, self.kind = float(learning_rate), float(min_lr_ratio), kind
        self.warmup = int(warmup_steps)
        self.span = float(max(1, total_steps - warmup_steps))

    def construct(self, global_step: Tensor) -> Tensor:
        step = ops.cast(global_step, ms.float32)
        left = ops.ones_like(step)
        if self.kind != "constant":
            done = ops.minimum((step - self.warmup) / self.span, Tensor(1.0, ms.float32))
            left = (1.0 + ops.cos(done * math.pi)) / 2.0 if self.kind == "cosine" else 1.0 - done
            left = self.final + (1.0 - self.final) * left
        if self.warmup > 0:
            left = ops.select(step < self.warmup, (step + 1.0) / self.warmup, left)
        return self.peak * left


class PanGuSigmaAdamW(Optimizer):
    """`optimizer`: gradients, received rows by layer -> AdamW with decoupled decay and bias correction.

    `received`: per sparse layer float32 [E], per embedding slots float32 [domains] last; an expert with 0 is untouched.
    `bind` must tell it first which parameter belongs to which expert group; the step wrapper does.
    """

    def __init__(
        self, params, learning_rate=1e-3, betas=(0.9, 0.95), eps: float = 1e-8, expert_eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, params, weight_decay=weight_decay)
        self.beta1, self.beta2 = float(betas[0]), float(betas[1])
        self.eps, self.expert_eps = float(eps), float(expert_eps)
        self.m = self._state("adam_m")
        self.v = self._state("adam_v")
        self.decays = self._decays()
        self.adamw = ops.AdamWeightDecay()
        self.select = ops.Select()
        self.done = Tensor(True)

    def _state(self, prefix: str) -> ParameterTuple:
        made = [Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"{prefix}.{p.name}") for p in self.parameters]
        return ParameterTuple(made)

    def _decays(self) -> tuple[float, ...]:
        if self.dynamic_weight_decay:
            raise UserError("optimizer.weight_decay changes with the steps, which is not built: write one number")
        decays = self.weight_decay if self.is_group else [self.weight_decay] * len(self.parameters)
        return tuple(float(d.asnumpy()) if isinstance(d, Tensor) else float(d) for d in decays)

    def bind(
        self, expert_tensors: dict[str, tuple[int, int]], sizes: tuple[int, ...], layer_names: tuple[str, ...]
    ) -> None:
        """`expert_tensors`: parameter name -> (layer's index, domain); the index behind the sparse layers' is the
        slots'."""
        slots = len(layer_names)
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        owners = [expert_tensors.get(p.name) for p in self.parameters]
        # Per parameter: its layer's index (-1: shared) and the range of its experts in that layer's `received`.
        self.layer_index = tuple(-1 if owner is None else owner[0] for owner in owners)
        self.begin = tuple(
            0 if owner is None else owner[1] if owner[0] == slots else offsets[owner[1]] for owner in owners
        )
        self.count = tuple(
            0 if owner is None else 1 if owner[0] == slots else sizes[owner[1]] for owner in owners
        )
        self.spread = tuple(
            (1,) * len(p.shape) if owner is not None and owner[0] == slots else (-1, *[1] * (len(p.shape) - 1))
            for p, owner in zip(self.parameters, owners, strict=True)
        )
        # One count of updates for each expert (shared parameters: `global_step`).
        lengths = dict.fromkeys(layer_names, sum(sizes))
        if slots in self.layer_index:
            lengths[DOMAIN_EMBEDDING] = len(sizes)
        self.steps = ParameterTuple([
            Parameter(Tensor(np.zeros(n, np.float32)), name=f"adam_steps.{layer_name}")
            for layer_name, n in lengths.items()
        ])  # fmt: skip

    def corrected(self, step: Tensor, rate: Tensor, eps: float):
        """(lr', eps', root of the second correction) of the formula in `rre.adamw`, for counts of any shape."""
        second = ops.sqrt(1.0 - ops.pow(Tensor(self.beta2, ms.float32), step))
        return rate * second / (1.0 - ops.pow(Tensor(self.beta1, ms.float32), step)), eps * second

    def construct(self, gradients: tuple[Tensor, ...], received: tuple[Tensor, ...]) -> Tensor:
        rate = self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = ops.cast(self.global_step, ms.float32).reshape(())
        done = self.done
        counts, touched = (), ()
        for layer_index in range(len(received)):
            active = received[layer_index] > 0.0
            count = self.steps[layer_index] + ops.cast(active, ms.float32)
            done = ops.depend(done, ops.assign(self.steps[layer_index], count))
            counts = counts + (ops.maximum(count, Tensor(1.0, ms.float32)),)
            touched = touched + (active,)
        shared_rate, shared_eps = self.corrected(step, rate, self.eps)
        for i in range(len(gradients)):
            if self.layer_index[i] < 0:
                decay = self.decays[i] * rate / shared_rate
                updated = self.adamw(
                    self.parameters[i], self.m[i], self.v[i], shared_rate, Tensor(self.beta1, ms.float32),
                    Tensor(self.beta2, ms.float32), shared_eps, decay, gradients[i],
                )  # fmt: skip
                done = ops.depend(done, updated)
            else:
                done = ops.depend(done, self.update_experts(i, gradients[i], rate, counts, touched))
        return done

    def update_experts(self, i: int, gradient: Tensor, rate: Tensor, counts, touched) -> Tensor:
        a, b = self.begin[i], self.begin[i] + self.count[i]
        step = counts[self.layer_index[i]][a:b].reshape(self.spread[i])
        active = touched[self.layer_index[i]][a:b].reshape(self.spread[i])
        expert_rate, eps = self.corrected(step, rate, self.expert_eps)
        parameter, m, v = self.parameters[i], self.m[i], self.v[i]
        new_m = self.beta1 * m + (1.0 - self.beta1) * gradient
        new_v = self.beta2 * v + (1.0 - self.beta2) * (gradient * gradient)
        new = parameter * (1.0 - rate * self.decays[i]) - expert_rate * (new_m / (ops.sqrt(new_v) + eps))
        active = ops.broadcast_to(active, parameter.shape)
        done = ops.assign(parameter, self.select(active, new, parameter))
        done = ops.depend(done, ops.assign(m, self.select(active, new_m, m)))
        return ops.depend(done, ops.assign(v, self.select(active, new_v, v)))
