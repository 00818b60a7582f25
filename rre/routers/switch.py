"""Switch: a learned top-1 gate over all experts of the layer (Fedus et al. 2021, arXiv 2101.03961)."""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from parallel.layout import Layout
from rre.dispatch import plan_in_graph
from rre.routers.base import Groups, Router


class SwitchRouter(Router):
    """Top-1 gate: output scaled by the expert's probability; auxiliary loss weight * E * sum_e f_e P_e.

    f_e is the fraction of tokens sent to e (before dropping; a constant in the gradient), P_e the mean probability
    (arXiv 2101.03961, equations 4 to 6; k = 1, so no question of dividing f by k). While training, an expert takes
    ceil(capacity_factor * S / E) rows of a sample of `length` S tokens, its dispatch group (None = dropless);
    evaluation never drops.
    """

    learned = True

    def __init__(
        self,
        groups: Groups,
        hidden: int,
        length: int,
        layout: Layout,
        auxiliary_weight: float = 0.01,
        capacity_factor: float | None = None,
        init_std: float = 0.02,
    ) -> None:
        self.groups = groups
        self.hidden = hidden
        self.length = length
        self.layout = layout
        self.auxiliary_weight = auxiliary_weight
        self.capacity_factor = capacity_factor
        self.init_std = init_std

    def cell(self) -> nn.Cell:
        return SwitchGate(self)


class SwitchGate(nn.Cell):
    """The gate inside the graph: x_TD -> plan, probabilities as combine weights, auxiliary loss, kept rows [B, E]."""

    def __init__(self, router: SwitchRouter) -> None:
        super().__init__()
        layout: Layout = router.layout
        self.experts = router.groups.total
        self.length = router.length
        self.auxiliary_weight = router.auxiliary_weight
        self.capacity_factor = router.capacity_factor
        self.weight = Parameter(initializer(Normal(router.init_std), (router.hidden, self.experts)), name="weight")
        self.logits = layout(ops.MatMul(), (1, 1), (1, 1))
        self.softmax = layout(ops.Softmax(-1), (1, 1))
        self.best = layout(ops.ArgMaxWithValue(axis=-1), (1, 1))
        self.one_hot = layout(ops.OneHot(), (1, 1), (), ())
        self.mean = layout(ops.ReduceMean(), (1, 1))
        self.sum = layout(ops.ReduceSum(), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.less_equal = layout(ops.LessEqual(), (1, 1, 1), ())
        self.cast = layout(ops.Cast(), (1, 1))
        self.cumulative = layout(ops.CumSum(), (1, 1))
        self.select = layout(ops.Select(), (1,), (1,), (1,))
        self.plan = plan_in_graph(self.experts, layout)
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, x: Tensor, routing: tuple[Tensor, ...]):
        # Counted noise [T, D] on the gate's input only: the paper's jitter.
        gate_input = x * routing[0] if len(routing) > 0 else x
        probabilities = self.softmax(self.logits(gate_input, self.weight))
        chosen, probability = self.best(probabilities)
        hits = ops.stop_gradient(self.one_hot(chosen, self.experts, self.on, self.off))
        tokens = x.shape[0]
        share = self.sum(hits, 0) / tokens
        auxiliary = self.sum(share * self.mean(probabilities, 0)) * (self.auxiliary_weight * self.experts)
        chosen = self.cast(chosen, ms.int32)
        # Evaluation drops nothing, whatever training does.
        if self.training and self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * self.length / self.experts)
            rank = self.cumulative(hits.reshape(-1, self.length, self.experts), 1)
            fits = self.cast(self.less_equal(rank, float(capacity)), ms.float32)
            hits = self.mul(hits, fits.reshape(tokens, self.experts))
            chosen = self.select(self.sum(hits, 1) > 0.0, chosen, ops.fill(ms.int32, (tokens,), self.experts))
        kept = self.sum(hits.reshape(-1, self.length, self.experts), 1)
        return self.plan(chosen.reshape(-1, 1)), probability, auxiliary, kept
