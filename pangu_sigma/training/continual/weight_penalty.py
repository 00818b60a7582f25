"""Weight penalty of continual learning: L2 or EWC, which pulls shared parameters towards the teacher's.

penalty = 1/2 * sum_i c_i (theta_i - theta*_i)^2 with c_i = l2 + ewc * F_i: L2 to the old weights, and elastic weight
consolidation with F the diagonal Fisher information (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from pangu_sigma.config.training_sections import RegulariseConfig
from pangu_sigma.tensor_names import tensor_name
from parallel.operator_layout import Layout


class WeightPenalty(nn.Cell):
    """(scale, the step's gradients in the order of `parameters`) -> (gradients with scale * the penalty's added, their
    square sums [n], penalty).

    teacher_weights: theta* by name; a parameter that it lacks, or has in another shape (a gate that grew), is not
    penalised. fisher: F by name, for ewc. strengths: the factors `l2` and `ewc`.

    The penalty does not depend on the batch, so it enters a step once, after all micro-batches and processes.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        teacher_weights: Mapping[str, np.ndarray],
        fisher: Mapping[str, np.ndarray] | None,
        strengths: RegulariseConfig,
        layout: Layout,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.is_penalised = tuple(
            p.name in teacher_weights and tuple(teacher_weights[p.name].shape) == tuple(p.shape) for p in parameters
        )
        penalised = [p for p, is_penalised in zip(parameters, self.is_penalised, strict=True) if is_penalised]
        self.centre = ParameterTuple([_constant("previous", p, teacher_weights[p.name]) for p in penalised])
        strength = [np.full(p.shape, strengths.l2, np.float32) for p in penalised]
        if strengths.ewc:
            strength = [
                s + np.float32(strengths.ewc) * fisher[p.name] for s, p in zip(strength, penalised, strict=True)
            ]
        self.strength = ParameterTuple([_constant("strength", p, s) for p, s in zip(penalised, strength, strict=True)])
        self.mul = layout(ops.Mul())
        self.sub = layout(ops.Sub())
        self.add = layout(ops.Add())
        self.sum = layout(ops.ReduceSum())
        self.half_square = layout(ops.L2Loss())
        self.stack = layout(ops.Stack())

    def construct(self, scale: Tensor, *gradients: Tensor):
        with_penalty, squares = (), ()
        penalty = Tensor(0.0, ms.float32)
        index = 0  # among the penalised parameters
        for i in range(len(gradients)):
            gradient = gradients[i]
            if self.is_penalised[i]:
                difference = self.sub(self.parameters[i], self.centre[index])
                pull = self.mul(difference, self.strength[index])
                penalty = penalty + self.sum(self.mul(pull, difference)) * 0.5
                gradient = self.add(gradient, pull * scale)
                index += 1
            with_penalty = with_penalty + (gradient,)
            squares = squares + (self.half_square(gradient),)
        return with_penalty, self.stack(squares) * 2.0, penalty


def _constant(kind: str, parameter: Parameter, value: np.ndarray) -> Parameter:
    return Parameter(Tensor(value), name=tensor_name(kind, parameter.name), requires_grad=False)
