"""Train step: its two compiled cells, the gradients of one micro-batch and the update of the shared parameters."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer

from pangu_sigma.model.forward_pass import ForwardPass
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.pangu import PanGuSigma
from pangu_sigma.tensor_names import tensor_name
from pangu_sigma.training.objective import TrainingObjective
from parallel.operator_layout import Layout
from parallel.ops.primitives import square_sums
from rre.adamw import has_weight_decay


class GradientStep(nn.Cell):
    """Loss and gradients of one micro-batch; the inputs are `GraphInputs.pack`'s, the loss is the objective's.

    Returns (loss sums per sample [B], auxiliary loss, rows [B, E + 1] of learned gates, gradients of the activated
    expert tensors, gradients of the shared parameters, their square sums [n]). `with_shared` False spares the shared
    gradients of a phase in which they are frozen.
    """

    def __init__(
        self,
        net: PanGuSigma,
        inputs: GraphInputs,
        layout: Layout,
        with_shared: bool,
        objective: TrainingObjective,
    ) -> None:
        super().__init__(auto_prefix=False)
        # An attribute, so that set_train reaches the network: dropout and capacity depend on it.
        self.loss = ForwardPass(net, inputs, objective.loss(net.head, layout))
        positions = inputs.differentiated
        self.with_experts = len(positions) > 0
        # MindSpore hands out the gradient of a single input bare, not as a tuple of one.
        self.single = len(positions) == 1
        self.with_shared = with_shared
        shared = ParameterTuple(net.trainable_params()) if with_shared else None
        self.value_and_grad = ops.value_and_grad(self.loss, positions or None, shared, has_aux=True)
        if with_shared:
            self.square_sums = square_sums(layout, [parameter.shape for parameter in shared])
        self.set_train()
        self.set_inputs(*inputs.placeholders(layout), *objective.extra_placeholders(inputs))

    def construct(self, *inputs: Tensor):
        values, gradients = self.value_and_grad(*inputs)
        _, by_sample, auxiliary, counts = values
        by_expert, shared = (), ()
        if self.with_experts and self.with_shared:
            by_expert, shared = gradients
        elif self.with_experts:
            by_expert = gradients
        else:
            shared = gradients
        by_expert = (by_expert,) if self.single else by_expert
        squares = self.square_sums(*shared) if self.with_shared else ()
        return by_sample, auxiliary, counts, by_expert, shared, squares


class SharedUpdate(nn.Cell):
    """AdamW over the shared parameters, in place: one fused operator per tensor (see `rre.adamw`)."""

    def __init__(self, parameters: Sequence[Parameter], layout: Layout) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.m = ParameterTuple([self._moment(p, "m") for p in parameters])
        self.v = ParameterTuple([self._moment(p, "v") for p in parameters])
        self.decayed = tuple(has_weight_decay(p.name) for p in parameters)
        self.adamw = layout(ops.AdamWeightDecay())
        self.mul = layout(ops.Mul())
        self.done = Tensor(True)
        self.no_decay = Tensor(0.0, ms.float32)

    @staticmethod
    def _moment(parameter: Parameter, kind: str) -> Parameter:
        zeros = initializer("zeros", parameter.shape, ms.float32)
        return Parameter(zeros, name=tensor_name(parameter.name, state=kind), requires_grad=False)

    def construct(
        self, scale: Tensor, rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, decay: Tensor,
        *gradients: Tensor,
    ) -> Tensor:  # fmt: skip
        done = self.done
        for i in range(len(gradients)):
            gradient = self.mul(gradients[i], scale)
            weight_decay = decay if self.decayed[i] else self.no_decay
            updated = self.adamw(
                self.parameters[i], self.m[i], self.v[i], rate, beta1, beta2, epsilon, weight_decay, gradient
            )
            done = ops.depend(done, updated)
        return done
