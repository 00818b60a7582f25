"""What holds shared parameters near those of the previous model: a pull on their gradients.

penalty = 1/2 * sum_i c_i (theta_i - theta*_i)^2 with c_i = l2 + ewc * F_i: L2 to the old weights, and elastic weight
consolidation with F the diagonal Fisher information (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from pangu_sigma.config.training_sections import RegulariseConfig
from parallel.operator_layout import Layout


class Distance(nn.Cell):
    """(scale, the step's gradients in the order of `parameters`) -> (gradients with scale * the penalty's added, their
    square sums [n], penalty).

    `previous`: theta* by name; a parameter that it lacks, or has in another shape (a gate that grew), is not held.
    `fisher`: F by name, for ewc.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        previous: Mapping[str, np.ndarray],
        fisher: Mapping[str, np.ndarray] | None,
        wanted: RegulariseConfig,
        layout: Layout,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.held = tuple(p.name in previous and tuple(previous[p.name].shape) == tuple(p.shape) for p in parameters)
        kept = [p for p, held in zip(parameters, self.held, strict=True) if held]
        self.centre = ParameterTuple([_constant("previous", p, previous[p.name]) for p in kept])
        strength = [np.full(p.shape, wanted.l2, np.float32) for p in kept]
        if wanted.ewc:
            strength = [s + np.float32(wanted.ewc) * fisher[p.name] for s, p in zip(strength, kept, strict=True)]
        self.strength = ParameterTuple([_constant("strength", p, s) for p, s in zip(kept, strength, strict=True)])
        self.mul = layout(ops.Mul())
        self.sub = layout(ops.Sub())
        self.add = layout(ops.Add())
        self.sum = layout(ops.ReduceSum())
        self.half_square = layout(ops.L2Loss())
        self.stack = layout(ops.Stack())

    def construct(self, scale: Tensor, *gradients: Tensor):
        changed, squares = (), ()
        penalty = Tensor(0.0, ms.float32)
        at = 0
        for i in range(len(gradients)):
            gradient = gradients[i]
            if self.held[i]:
                apart = self.sub(self.parameters[i], self.centre[at])
                pull = self.mul(apart, self.strength[at])
                penalty = penalty + self.sum(self.mul(pull, apart)) * 0.5
                gradient = self.add(gradient, pull * scale)
                at += 1
            changed = changed + (gradient,)
            squares = squares + (self.half_square(gradient),)
        return changed, self.stack(squares) * 2.0, penalty


def _constant(kind: str, parameter: Parameter, value: np.ndarray) -> Parameter:
    return Parameter(Tensor(value), name=f"{kind}.{parameter.name}", requires_grad=False)
