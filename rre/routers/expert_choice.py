"""Expert-choice routing: every expert takes its best tokens (Zhou et al. 2022, arXiv 2202.09368, section 3.2)."""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn, ops

from rre.dispatch.dispatch_plan import build_plan_cell
from rre.routers.learned_gate import LearnedRouter, add_gate_weights


class ExpertChoiceRouter(LearnedRouter):
    """Expert-choice router: of every sample's S tokens each expert takes the ceil(S K / E) most probable ones.

    The probability (softmax over the experts) is also the combine weight; a token may have any number of experts, K on
    average.

    The set that an expert chooses from is one sample, in training and evaluation: it depends on no other sample and on
    no process. Padding is taken by nobody, but the number of tokens that an expert may take is of the whole row. Load
    is even by construction and there is no auxiliary loss. It is not causal: whether a token is taken depends on later
    ones, so a model of it cannot write text.
    """

    @property
    def taken(self) -> int:
        """C, the tokens that an expert takes of a sample."""
        even = self.options.length * self.choices / self.options.groups.total
        return min(self.options.length, math.ceil(even))

    def cell(self) -> nn.Cell:
        return ExpertChoiceGate(self)


class ExpertChoiceGate(nn.Cell):
    """Expert-choice gate: x_TD -> (plan, combine weights [R], 0, rows [B, E + 1]), R = E B C rows, expert by expert.

    B samples of S tokens, of each of which an expert takes C.

    The plan is the token of every row int32 [R], then the plan of those rows as if each were a token with one choice.
    The last of `rows` counts the tokens that no expert took. With `return_assignments` it gives the hits [T, E].
    """

    def __init__(self, router: ExpertChoiceRouter) -> None:
        super().__init__()
        options = router.options
        layout = options.layout
        self.experts, self.length, self.taken = options.groups.total, options.length, router.taken
        add_gate_weights(self, options)
        self.logits = layout(ops.MatMul(), (1, 1), (1, 1))
        self.softmax = layout(ops.Softmax(-1), (1, 1))
        self.turn = layout(ops.Transpose(), (1, 1, 1))
        self.top = layout(ops.TopK(sorted=True), (1, 1, 1))
        self.take = layout(ops.GatherD(), (1, 1, 1), (1, 1, 1))
        self.add_up = layout(ops.UnsortedSegmentSum(), (1,), (1,))
        self.cast = layout(ops.Cast(), (1, 1))
        self.sum = layout(ops.ReduceSum(keep_dims=True), (1, 1))
        self.concat = layout(ops.Concat(1), (1, 1), (1, 1))
        self.plan = build_plan_cell(self.experts, layout, options.exchange)
        self.return_assignments, self.padded = False, options.padded
        self.behind = layout(ops.Add(), (1, 1, 1), (1, 1, 1))
        self.weigh = layout(ops.Mul(), (1,), (1,))
        self.both = layout(ops.Mul(), (1, 1), (1, 1))
        self.row_sum = layout(ops.ReduceSum(), (1, 1, 1))
        self.one_hot = layout(ops.OneHot(), (1, 1), (), ())
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
        self.add_hits = layout(ops.UnsortedSegmentSum(), (1, 1), (1,))

    def construct(self, x_TD: Tensor, routing: tuple[Tensor, ...]):
        if self.padded and self.training:
            return self.choose_text(x_TD, routing[0])
        batch = x_TD.shape[0] // self.length
        probs_EBS = self.probabilities(x_TD)
        _, positions_EBC = self.top(ops.stop_gradient(probs_EBS), self.taken)
        weights_R = self.take(probs_EBS, 2, positions_EBC).reshape(-1)
        tokens_R, owner_ER = self.rows_of(positions_EBC)
        plan = (tokens_R,) + self.plan(owner_ER.reshape(-1, 1))
        if self.return_assignments:
            hits_RE = self.one_hot(owner_ER.reshape(-1), self.experts, self.on, self.off)
            hits_TE = self.add_hits(hits_RE, tokens_R, x_TD.shape[0])
            return plan, weights_R, Tensor(0.0, ms.float32), ops.stop_gradient(hits_TE)
        times_BS = self.add_up(ops.ones_like(weights_R), tokens_R, x_TD.shape[0]).reshape(batch, self.length)
        untaken_B1 = self.sum(self.cast(times_BS < 0.5, ms.float32), 1)
        rows_BE = ops.fill(ms.float32, (batch, self.experts), float(self.taken))
        return plan, weights_R, Tensor(0.0, ms.float32), ops.stop_gradient(self.concat((rows_BE, untaken_B1)))

    def choose_text(self, x_TD: Tensor, text_T1: Tensor):
        """As `construct`, among the tokens of text alone: a row that would be padding has no expert and weight 0."""
        batch = x_TD.shape[0] // self.length
        text_BS = text_T1.reshape(batch, self.length)
        probs_EBS = self.probabilities(x_TD)
        text_EBS = ops.BroadcastTo(probs_EBS.shape)(text_T1.reshape(1, batch, self.length))
        # Below every probability: an expert takes padding last.
        _, positions_EBC = self.top(ops.stop_gradient(self.behind(probs_EBS, text_EBS - 1.0)), self.taken)
        is_text_R = self.take(text_EBS, 2, positions_EBC).reshape(-1)
        weights_R = self.weigh(self.take(probs_EBS, 2, positions_EBC).reshape(-1), is_text_R)
        tokens_R, owner_ER = self.rows_of(positions_EBC)
        owner_R1 = owner_ER.reshape(-1, 1)
        nobody_R1 = ops.fill(ms.int32, owner_R1.shape, self.experts)
        plan = (tokens_R,) + self.plan(ops.select(is_text_R.reshape(-1, 1) > 0.5, owner_R1, nobody_R1))
        times_BS = self.add_up(is_text_R, tokens_R, x_TD.shape[0]).reshape(batch, self.length)
        untaken_B1 = self.sum(self.both(self.cast(times_BS < 0.5, ms.float32), text_BS), 1)
        rows_EB = self.row_sum(is_text_R.reshape(self.experts, batch, self.taken), 2)
        rows_BE = ops.transpose(rows_EB, (1, 0))
        return plan, weights_R, Tensor(0.0, ms.float32), ops.stop_gradient(self.concat((rows_BE, untaken_B1)))

    def probabilities(self, x_TD: Tensor) -> Tensor:
        """Probabilities [E, B, S]."""
        probs_TE = self.softmax(self.logits(x_TD, self.weight))
        return self.turn(probs_TE.reshape(-1, self.length, self.experts), (2, 0, 1))

    def rows_of(self, positions_EBC: Tensor) -> tuple[Tensor, Tensor]:
        """(token of every row int32 [R], its expert int32 [E, B C])."""
        batch = positions_EBC.shape[1]
        first_B = ops.arange(0, batch * self.length, self.length, dtype=ms.int32)
        tokens_R = (positions_EBC + first_B.reshape(1, batch, 1)).reshape(-1)
        experts_E1 = ops.arange(0, self.experts, 1, dtype=ms.int32).reshape(-1, 1)
        return tokens_R, ops.BroadcastTo((self.experts, batch * self.taken))(experts_E1)
